/* A weight as a product of L factors, elementwise, and two derivatives of it.

     x      = ((w_1 w_2) w_3) ... w_L
     dw_i   = (dx w_1 ... w_{i-1}) (w_{i+1} ... w_L)          the second product from the back

   With tangents v_i, (a, da) (b, db) = (a b, da b + a db):

     ddx    = tangent of (w_1, v_1) ... (w_L, v_L)
     ddw_i  = dx * tangent of ((w_1, v_1) ... (w_{i-1}, v_{i-1})) ((w_{i+1}, v_{i+1}) ... (w_L, v_L))

   Every operation is rounded on its own, in float for 16- and 32-bit tensors and in double for 64-bit ones. */
#ifndef PYSTEEP_FACTOR_PRODUCT_H
#define PYSTEEP_FACTOR_PRODUCT_H

#include "pysteep/tensors.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PYSTEEP_MAX_DEPTH 64

/* Tensors of one weight: `numel` elements of `dtype` each, in one element order; factor, tangent and factor_gradient are
   `depth` addresses, 1 <= depth <= PYSTEEP_MAX_DEPTH. What an op does not use is NULL. */
typedef struct pysteep_product_tensors {
  int64_t numel, depth;
  pysteep_dtype dtype;
  const void* const* factor;
  const void* const* tangent;
  const void* gradient;         /* dx */
  void* result;                 /* x, or ddx */
  void* const* factor_gradient; /* dw_i, or ddw_i */
} pysteep_product_tensors;

/* Reads factor, writes result. Returns 0, as all of these. */
int pysteep_factor_product_cpu(const pysteep_product_tensors*);
/* Reads factor and gradient, writes factor_gradient. */
int pysteep_factor_product_backward_cpu(const pysteep_product_tensors*);
/* Reads factor, tangent and gradient, writes result and factor_gradient. */
int pysteep_factor_product_double_backward_cpu(const pysteep_product_tensors*);

/* The same on GPU `device`, which stays the current one: asynchronous, on `stream`, one launch. Returns the cudaError_t. */
int pysteep_factor_product_cuda(const pysteep_product_tensors*, int device, void* stream);
int pysteep_factor_product_backward_cuda(const pysteep_product_tensors*, int device, void* stream);
int pysteep_factor_product_double_backward_cuda(const pysteep_product_tensors*, int device, void* stream);

/* The GPU's code run by the CPU on host memory, block by block and thread by thread: for tests without a GPU. */
int pysteep_factor_product_cuda_on_host(const pysteep_product_tensors*);
int pysteep_factor_product_backward_cuda_on_host(const pysteep_product_tensors*);
int pysteep_factor_product_double_backward_cuda_on_host(const pysteep_product_tensors*);

#ifdef __cplusplus
}
#endif
#endif
