/* Steepest descent on the factors of x = w_1 * ... * w_L, given the gradient of x.   [Eq. 5, Sec. 4]

     g <- g / grad_scale;  g <- -g if maximize
     g_i <- (g w_1 ... w_{i-1}) (w_{i+1} ... w_L)             all at the old factors
     w_i, m_i <- steepest_step(w_i, g_i, m_i)                 for each i: steepest_step.h
     x <- w_1 ... w_L                                         of the factors as they are stored

   Full: depth factors are stored. Tied: two, w_1 and r = w_2 = ... = w_L, which equal gradients keep equal:

     g_1 = g (r^(L-2) r);  g_r = g (w_1 r^(L-2));  x = w_1 (r^(L-2) r)

   with r^(L-2) by squaring, from the highest bit of L-2 down. Every operation is rounded on its own, in float for 16- and
   32-bit x and in double for 64-bit x. Factors are stored as rounding.h says; x, which nobody reads again, to the nearest. */
#ifndef PYSTEEP_FACTOR_STEP_H
#define PYSTEEP_FACTOR_STEP_H

#include "pysteep/steepest_step.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` weights of numel[i] elements, as in steepest_step.h. Factor k of weight i is factor[k * count + i], k < stored;
   momentum likewise, or NULL. stored = depth <= PYSTEEP_MAX_DEPTH, or stored = 2 < depth: tied. x is only written. */
typedef struct pysteep_factor_tensors {
  int64_t count, stored, depth;
  const int64_t* numel;
  void* const* weight;
  const void* const* gradient;
  void* const* factor;
  void* const* momentum;
  pysteep_dtype weight_dtype, gradient_dtype, factor_dtype, momentum_dtype;
} pysteep_factor_tensors;

/* options->step_scale is not used. Returns 0. */
int pysteep_factor_step_cpu(const pysteep_factor_tensors*, const pysteep_steepest_options*, const pysteep_rounding*);

/* The same on GPU `device`, which stays the current one: asynchronous, on `stream`. Built for gradients, factors and momenta of
   the weight's dtype, and of float32 beside 16-bit weights where factors and momenta agree; returns cudaErrorInvalidValue (1)
   for any other, else the cudaError_t of the launch. */
int pysteep_factor_step_cuda(const pysteep_factor_tensors*, const pysteep_steepest_options*, const pysteep_rounding*,
                             int device, void* stream);

/* The GPU's code run by the CPU on host memory, block by block and thread by thread: for tests without a GPU. */
int pysteep_factor_step_cuda_on_host(const pysteep_factor_tensors*, const pysteep_steepest_options*, const pysteep_rounding*);

#ifdef __cplusplus
}
#endif
#endif
