/* Steepest descent in L_p, 1/p + 1/q = 1, with coupled and decoupled decay.   [Eq. 3, Eq. 5, Alg. 2]

     g <- g / grad_scale;  g <- -g if maximize;  g <- g + coupled_weight_decay w
     c <- beta1 m + (1 - beta1) g                (without momentum: c = g)
     u <- sign(c) |c|^(q-1)
     w <- w (1 - lr weight_decay) - lr step_scale u
     m <- beta2 m + (1 - beta2) g

   Every operation is rounded on its own, in float for 16- and 32-bit tensors and in double for 64-bit ones. Numbers such as
   1 - lr weight_decay are formed in double and rounded once. Weights are stored as rounding.h says, momenta to the nearest. */
#ifndef PYSTEEP_STEEPEST_STEP_H
#define PYSTEEP_STEEPEST_STEP_H

#include "pysteep/rounding.h"
#include "pysteep/tensors.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` tensors, tensor i of numel[i] elements in one dense block; w, g and m of a tensor share one element order.
   momentum is NULL when there is none. Addresses need only be aligned to their element. */
typedef struct pysteep_steepest_tensors {
  int64_t count;
  const int64_t* numel;
  void* const* weight;
  const void* const* gradient;
  void* const* momentum;
  pysteep_dtype weight_dtype, gradient_dtype, momentum_dtype;
} pysteep_steepest_tensors;

/* found_inf other than 0: nothing is written. */
typedef struct pysteep_steepest_options {
  double q, weight_decay, coupled_weight_decay;
  int maximize;
  pysteep_scalar beta1, beta2, lr, step_scale, grad_scale, found_inf;
} pysteep_steepest_options;

/* w and m are updated in place. Returns 0. */
int pysteep_steepest_step_cpu(const pysteep_steepest_tensors*, const pysteep_steepest_options*, const pysteep_rounding*);

/* *sum <- sum over all elements of |c|^q, in double; nothing else is written. ||c||_q^(2-q) = sum^((2-q)/q). Returns 0. */
int pysteep_steepest_power_sum_cpu(const pysteep_steepest_tensors*, const pysteep_steepest_options*, const pysteep_rounding*,
                                   double* sum);

/* The same on GPU `device`, which stays the current one: asynchronous, on `stream`, one launch for up to
   PYSTEEP_CUDA_TENSORS tensors, or for 264 that are not rounded to the nearest. Built for gradients and momenta of the weight's
   dtype, and of float32 beside 16-bit weights; returns cudaErrorInvalidValue (1) for any other, else the cudaError_t of the
   launch. */
#define PYSTEEP_CUDA_TENSORS 440
int pysteep_steepest_step_cuda(const pysteep_steepest_tensors*, const pysteep_steepest_options*, const pysteep_rounding*,
                               int device, void* stream);

/* Adds to partial_sums[0 .. PYSTEEP_CUDA_PARTIAL_SUMS), in device memory, zeroed by the caller; their sum is the result. */
#define PYSTEEP_CUDA_PARTIAL_SUMS 262144
int pysteep_steepest_power_sum_cuda(const pysteep_steepest_tensors*, const pysteep_steepest_options*, const pysteep_rounding*,
                                    double* partial_sums, int device, void* stream);

/* The GPU's code run by the CPU on host memory, block by block and thread by thread: for tests without a GPU. */
int pysteep_steepest_step_cuda_on_host(const pysteep_steepest_tensors*, const pysteep_steepest_options*,
                                       const pysteep_rounding*);
int pysteep_steepest_power_sum_cuda_on_host(const pysteep_steepest_tensors*, const pysteep_steepest_options*,
                                            const pysteep_rounding*, double* partial_sums);

const char* pysteep_cuda_error_string(int error);

#ifdef __cplusplus
}
#endif
#endif
