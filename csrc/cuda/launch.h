// What every op's launch shares: a table of tensors passed by value, cut into chunks that the blocks of a grid take in turn.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "math/portable.h"

namespace pysteep::cuda {

constexpr int threads_per_block = 256;
constexpr int blocks_per_multiprocessor = 8;
template <typename Storage>
constexpr int vector_elements = 16 / sizeof(Storage);

template <typename Storage, int N>
struct alignas(16) Vector {
  Storage element[N];
};

// The tensor that holds `chunk`, where tensor i holds the chunks from first_chunk[i] to first_chunk[i + 1].
PYSTEEP_INLINE int tensor_of_chunk(const int32_t* first_chunk, int count, int32_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Enough blocks to fill the device; each takes chunk after chunk.
inline int grid_blocks(int device, int32_t chunks) {
  int multiprocessors = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return static_cast<int>(std::min<int64_t>(chunks, int64_t(std::max(multiprocessors, 1)) * blocks_per_multiprocessor));
}

}  // namespace pysteep::cuda
