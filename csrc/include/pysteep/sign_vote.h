/* Signs as bits, and the majority of them.

     bit_j   = g_j > 0, or g_j is 0 or NaN and j + phase is even       8 of them a byte, the lowest bit first; 0 past the end
     vote_j  = sign(sum over voters of (2 bit_j - 1)): 1, -1, or 0 where as many bits are 1 as 0

   Source: signSGD with majority vote (Bernstein et al., ICML 2018, ICLR 2019). A bit has no third state: zeros take turns. */
#ifndef PYSTEEP_SIGN_VOTE_H
#define PYSTEEP_SIGN_VOTE_H

#include "pysteep/tensors.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PYSTEEP_MAX_VOTERS 65535

/* `words` has `rows` rows of `row_bytes` bytes, 8 row_bytes >= numel. To pack, `values` has as many rows of `numel` gradients;
   to count, a row is a voter, 1 <= rows <= PYSTEEP_MAX_VOTERS, and `values` has `numel` results. */
typedef struct pysteep_votes {
  int64_t rows, numel, row_bytes;
  void* values;
  uint8_t* words;
  pysteep_dtype dtype; /* of values */
} pysteep_votes;

/* Reads values, writes words. Of `phase` the lowest bit counts. Returns 0, as both of these. */
int pysteep_pack_signs_cpu(const pysteep_votes*, int64_t phase);
/* Reads words, writes values. */
int pysteep_count_votes_cpu(const pysteep_votes*);

/* The same on GPU `device`, which stays the current one: asynchronous, on `stream`, one launch. Returns the cudaError_t. */
int pysteep_pack_signs_cuda(const pysteep_votes*, int64_t phase, int device, void* stream);
int pysteep_count_votes_cuda(const pysteep_votes*, int device, void* stream);

/* The GPU's code run by the CPU on host memory, block by block and thread by thread: for tests without a GPU. */
int pysteep_pack_signs_cuda_on_host(const pysteep_votes*, int64_t phase);
int pysteep_count_votes_cuda_on_host(const pysteep_votes*);

#ifdef __cplusplus
}
#endif
#endif
