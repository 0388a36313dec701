// sign_vote on NVIDIA GPUs. The arithmetic is in math/sign_vote.h. A thread has a byte of the words, 8 elements.
#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "math/sign_vote.h"
#include "pysteep/sign_vote.h"

namespace pysteep::cuda {
namespace {

using Votes = pysteep_votes;
constexpr int most_planes = 16;  // hold PYSTEEP_MAX_VOTERS

template <typename Storage>
PYSTEEP_INLINE void pack_body(const Votes& votes, uint32_t zeros, bool aligned, int block, int thread, int grid) {
  const int64_t bytes = votes.rows * votes.row_bytes;
#pragma unroll 1
  for (int64_t at = int64_t(block) * threads_per_block + thread; at < bytes; at += int64_t(grid) * threads_per_block) {
    const int64_t row = at / votes.row_bytes, first = 8 * (at % votes.row_bytes), left = votes.numel - first;
    const int64_t begin = row * votes.numel + first;
    Vector<Storage, 8> vector;
    if (aligned && left >= 8) {
      vector = load<Storage, 8>(votes.values, begin);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < left) vector.element[j] = static_cast<const Storage*>(votes.values)[begin + j];
    }
    uint32_t positive = 0, negative = 0, filled = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= left) continue;
      const bits_t<Storage> x = bit_cast<bits_t<Storage>>(vector.element[j]);
      positive |= uint32_t(is_positive<Storage>(x)) << j;
      negative |= uint32_t(is_negative<Storage>(x)) << j;
      filled |= 1u << j;
    }
    votes.words[at] = uint8_t(packed(positive, negative, zeros) & filled);
  }
}

template <typename Storage>
PYSTEEP_INLINE void count_body(const Votes& votes, bool aligned, int block, int thread, int grid) {
  const int64_t bytes = (votes.numel + 7) / 8, limit = votes.rows / 2;
#pragma unroll 1
  for (int64_t at = int64_t(block) * threads_per_block + thread; at < bytes; at += int64_t(grid) * threads_per_block) {
    uint32_t plane[most_planes] = {};
#pragma unroll 4
    for (int64_t row = 0; row < votes.rows; ++row) {
      uint32_t carry = votes.words[row * votes.row_bytes + at];
#pragma unroll
      for (int p = 0; p < most_planes; ++p) {
        if ((row + 1) >> p == 0) break;  // no number has got so far
        half_add(plane[p], carry);
      }
    }
    uint32_t more = 0, equal = ~0u;
#pragma unroll
    for (int p = most_planes - 1; p >= 0; --p) compare(plane[p], (limit >> p & 1) != 0, more, equal);
    if (votes.rows % 2 != 0) equal = 0;
    Vector<Storage, 8> vector;
#pragma unroll
    for (int j = 0; j < 8; ++j) vector.element[j] = vote<Storage>((more >> j & 1) != 0, (equal >> j & 1) != 0);
    const int64_t left = votes.numel - 8 * at;
    if (aligned && left >= 8) {
      store(vector, votes.values, 8 * at);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < left) static_cast<Storage*>(votes.values)[8 * at + j] = vector.element[j];
    }
  }
}

template <typename Storage>
__global__ void __launch_bounds__(threads_per_block)
    pack_signs_kernel(const __grid_constant__ Votes votes, uint32_t zeros, bool aligned) {
  pack_body<Storage>(votes, zeros, aligned, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename Storage>
__global__ void __launch_bounds__(threads_per_block) count_votes_kernel(const __grid_constant__ Votes votes, bool aligned) {
  count_body<Storage>(votes, aligned, blockIdx.x, threadIdx.x, gridDim.x);
}

int blocks_for(int64_t bytes, const Where& where) {
  const int64_t blocks = (bytes + threads_per_block - 1) / threads_per_block;
  return grid_blocks(where, static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX)));
}

// Whether every 8 elements of every row begin at 16 bytes.
template <typename Storage>
bool is_aligned(const Votes& votes, bool one_row) {
  const bool rows = one_row || votes.rows == 1 || votes.numel * int64_t(sizeof(Storage)) % 16 == 0;
  return rows && reinterpret_cast<uintptr_t>(votes.values) % 16 == 0;
}

template <typename Storage>
cudaError_t pack(const Votes& votes, uint32_t zeros, const Where& where) {
  const bool aligned = is_aligned<Storage>(votes, false);
  const auto body = [&](int block, int thread, int grid) { pack_body<Storage>(votes, zeros, aligned, block, thread, grid); };
  const int grid = blocks_for(votes.rows * votes.row_bytes, where);
  return launch(pack_signs_kernel<Storage>, body, grid, where, votes, zeros, aligned);
}

template <typename Storage>
cudaError_t count(const Votes& votes, const Where& where) {
  const bool aligned = is_aligned<Storage>(votes, true);
  const auto body = [&](int block, int thread, int grid) { count_body<Storage>(votes, aligned, block, thread, grid); };
  return launch(count_votes_kernel<Storage>, body, blocks_for((votes.numel + 7) / 8, where), where, votes, aligned);
}

cudaError_t run_pack(const Votes& votes, int64_t phase, const Where& where) {
  if (votes.rows * votes.row_bytes == 0) return cudaSuccess;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  const uint32_t zeros = zeros_of(phase);
  switch (votes.dtype) {
    case PYSTEEP_FLOAT16:
      return pack<float16>(votes, zeros, where);
    case PYSTEEP_BFLOAT16:
      return pack<bfloat16>(votes, zeros, where);
    case PYSTEEP_FLOAT32:
      return pack<float>(votes, zeros, where);
    default:
      return pack<double>(votes, zeros, where);
  }
}

cudaError_t run_count(const Votes& votes, const Where& where) {
  if (votes.numel == 0) return cudaSuccess;
  if (votes.rows < 1 || votes.rows > PYSTEEP_MAX_VOTERS) return cudaErrorInvalidValue;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  switch (votes.dtype) {
    case PYSTEEP_FLOAT16:
      return count<float16>(votes, where);
    case PYSTEEP_BFLOAT16:
      return count<bfloat16>(votes, where);
    case PYSTEEP_FLOAT32:
      return count<float>(votes, where);
    default:
      return count<double>(votes, where);
  }
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_pack_signs_cuda(const pysteep_votes* votes, int64_t phase, int device, void* stream) {
  return pysteep::cuda::run_pack(*votes, phase, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_count_votes_cuda(const pysteep_votes* votes, int device, void* stream) {
  return pysteep::cuda::run_count(*votes, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_pack_signs_cuda_on_host(const pysteep_votes* votes, int64_t phase) {
  return pysteep::cuda::run_pack(*votes, phase, {true, 0, nullptr});
}

int pysteep_count_votes_cuda_on_host(const pysteep_votes* votes) {
  return pysteep::cuda::run_count(*votes, {true, 0, nullptr});
}

}  // extern "C"
