/* Whole training runs of diagonal networks: x = w_1 r^(L-1), L >= 2, or x = w_1 fits y by Z x.   [Sec. 5, App. F, App. I]

     rows <- all k of Z, or batch_size draws with replacement: row floor(k u / 2^32) for the j-th 32-bit word u of
             Philox4x32-10 with the run's seed as its key and (step, j / 4) as its counter
     mean_square:  f = mean (p - y)^2,    df/dp = 2 (p - y) / number of rows        p = Z x
     exponential:  f = mean exp(-y p),    df/dp = -y exp(-y p) / number of rows     -y p is cut off where exp overflows
     (as a sum instead of a mean: without the division)
     g <- Z^T df/dp;  g_1 <- g r^(L-1);  g_r <- g (w_1 r^(L-2))
     w_1, r <- steepest_step(w_1, g_1), steepest_step(r, g_r), or Adam's step with decoupled decay

   w_2 = ... = w_L = r: factors that start equal stay equal. Every run has its own problem, q, depth, lr, decays and seed; its
   numbers do not depend on what else is in the call. In float or in double. */
#ifndef PYSTEEP_DIAGONAL_FLOW_H
#define PYSTEEP_DIAGONAL_FLOW_H

#include "pysteep/steepest_step.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pysteep_flow_loss { PYSTEEP_MEAN_SQUARE = 0, PYSTEEP_EXPONENTIAL = 1 } pysteep_flow_loss;

/* Row-major: first, rest [runs, n], updated; moments [4, runs, n], of w_1 and then of r each Adam's first and second, or NULL:
   steepest_step; Z [problems, k, n], y [problems, k]. The other arrays have a number for each run. */
typedef struct pysteep_diagonal_flows {
  int64_t runs, k, n;
  void *first, *rest, *moments;
  const void *Z, *y;
  const int64_t *problem, *depth;
  const uint64_t* seed;
  const double *q, *lr, *weight_decay, *coupled_weight_decay;
  int64_t batch_size; /* 0: all rows */
  pysteep_flow_loss loss;
  int mean;
  double beta1, beta2, epsilon; /* Adam's */
  pysteep_dtype dtype;          /* float32 or float64 */
} pysteep_diagonal_flows;

/* The steps [begin, end) of every run, counted from 0. Returns 0, or 1 where memory was not to be had. */
int pysteep_diagonal_flow_cpu(const pysteep_diagonal_flows*, int64_t begin, int64_t end);

/* The same on GPU `device`, all arrays in its memory: asynchronous, on `stream`. Returns cudaErrorInvalidValue (1) where one
   run's factors do not fit a block's shared memory, else the cudaError_t of the launch. */
int pysteep_diagonal_flow_cuda(const pysteep_diagonal_flows*, int64_t begin, int64_t end, int device, void* stream);

/* The GPU's code run by the CPU on host memory: for tests without a GPU. */
int pysteep_diagonal_flow_cuda_on_host(const pysteep_diagonal_flows*, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
#endif
