/* One step of the steepest mirror flow of x = w_1 * ... * w_L, from x and one number.   [Def. 4.6, Thm 4.8, Lemma 4.5]

     z (z + balance)^(L-1) = |x|^q, z >= 0;  w_2 = ... = w_L = (z + balance)^(1/q);  w_1 = x / w_2^(L-1), |w_1|^q = z
     g <- g / grad_scale;  g <- -g if maximize
     w_1' <- w_1 (1 - lr weight_decay) - lr u(g w_2^(L-1))         u(c) = sign(c) |c|^(q-1)
     w_2' <- w_2 (1 - lr weight_decay) - lr u(g w_1 w_2^(L-2))
     x <- x + (w_1' w_2'^(L-1) - w_1 w_2^(L-1))                    x stays as it is where g = 0 and weight_decay = 0

   In float for 16- and 32-bit x and in double for 64-bit x; the change of x is right to about 4 L
   ulp of the terms that it is a sum of. x is stored as rounding.h says. */
#ifndef PYSTEEP_MIRROR_STEP_H
#define PYSTEEP_MIRROR_STEP_H

#include "pysteep/steepest_step.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` weights of numel[i] elements, as in steepest_step.h; balance[i] points to that of weight i, >= 0, on the device. */
typedef struct pysteep_mirror_tensors {
  int64_t count, depth;
  const int64_t* numel;
  void* const* weight;
  const void* const* gradient;
  const double* const* balance;
  pysteep_dtype weight_dtype, gradient_dtype;
} pysteep_mirror_tensors;

/* Of the options beta1, beta2, coupled_weight_decay and step_scale are not used. Returns 0. */
int pysteep_mirror_step_cpu(const pysteep_mirror_tensors*, const pysteep_steepest_options*, const pysteep_rounding*);

/* The same on GPU `device`, which stays the current one: asynchronous, on `stream`. Built for gradients of the weight's dtype
   and of float32 beside 16-bit weights; returns cudaErrorInvalidValue (1) for any other, else the cudaError_t of the launch. */
int pysteep_mirror_step_cuda(const pysteep_mirror_tensors*, const pysteep_steepest_options*, const pysteep_rounding*,
                             int device, void* stream);

/* The GPU's code run by the CPU on host memory, block by block and thread by thread: for tests without a GPU. */
int pysteep_mirror_step_cuda_on_host(const pysteep_mirror_tensors*, const pysteep_steepest_options*, const pysteep_rounding*);

#ifdef __cplusplus
}
#endif
#endif
