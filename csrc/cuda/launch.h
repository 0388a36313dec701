// What every op's launch shares: tensors in tables passed by value, cut into chunks that the blocks of a grid take in turn.
// Kernels need no barrier, so the body of each is a plain function of (block, thread, grid) that the CPU can run as well.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "math/portable.h"
#include "pysteep/rounding.h"

namespace pysteep::cuda {

constexpr int threads_per_block = 256;
constexpr int blocks_per_multiprocessor = 8;
constexpr int64_t largest_argument = 32764;  // bytes that a kernel takes

// Other than to the nearest: the rows of a table from `row` on are the compensations of each role, or `first` and `stream`.
struct TableRounding {
  pysteep_rounding_mode mode;
  int32_t row;
  uint64_t seed;
  pysteep_scalar step;
};

// A kernel's argument: the addresses of many tensors, `rows` for each.
template <typename OptionsOfOp, int Tensors, int Addresses>
struct Table {
  using Options = OptionsOfOp;
  static constexpr int most_tensors = Tensors, most_addresses = Addresses;
  Options options;
  int32_t count, chunks;
  int32_t capacity;  // in tensors: the more rows, the fewer
  int64_t numel[Tensors];
  void* address[Addresses];          // row * capacity + tensor
  int32_t first_chunk[Tensors + 1];  // tensor i holds the chunks from first_chunk[i] to first_chunk[i + 1]
  bool aligned[Tensors];             // every address, to 16 bytes
  TableRounding rounding;

  template <typename T>
  PYSTEEP_INLINE T* at(int row, int tensor) const {
    return static_cast<T*>(address[row * capacity + tensor]);
  }
  PYSTEEP_INLINE void* compensation(int role, int tensor) const { return at<void>(rounding.row + role, tensor); }
  PYSTEEP_INLINE int64_t first(int tensor) const { return reinterpret_cast<intptr_t>(at<void>(rounding.row, tensor)); }
  PYSTEEP_INLINE uint32_t stream(int tensor) const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at<void>(rounding.row + 1, tensor)));
  }
};

// Elements [begin, end) of a tensor; `full`: as many as a chunk has, and aligned.
struct Chunk {
  int tensor;
  bool full;
  int64_t begin, end;
};

template <typename Table>
PYSTEEP_INLINE int tensor_of_chunk(const Table& table, int32_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Calls visit(chunk) for every chunk of the block.
template <int64_t ChunkElements, typename Table, typename Visit>
PYSTEEP_INLINE void for_each_chunk(const Table& table, int block, int grid, const Visit& visit) {
#pragma unroll 1
  for (int32_t chunk = block; chunk < table.chunks; chunk += grid) {
    const int tensor = tensor_of_chunk(table, chunk);
    const int64_t begin = (chunk - table.first_chunk[tensor]) * ChunkElements, numel = table.numel[tensor];
    const bool whole = numel - begin >= ChunkElements;
    visit(Chunk{tensor, whole && table.aligned[tensor], begin, whole ? begin + ChunkElements : numel});
  }
}

// Where a call runs.
struct Where {
  bool on_host;
  int device;
  cudaStream_t stream;
};

inline cudaError_t select_device(const Where& where) { return where.on_host ? cudaSuccess : cudaSetDevice(where.device); }

// Enough blocks to fill the device; each takes chunk after chunk.
inline int grid_blocks(const Where& where, int32_t chunks, int largest = INT32_MAX) {
  int multiprocessors = 0;
  if (where.on_host) return std::min<int32_t>(chunks, 3);  // fewer than chunks, so that a block takes several
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, where.device);
  return std::min({chunks, std::max(multiprocessors, 1) * blocks_per_multiprocessor, largest});
}

// Runs `kernel`, or for each thread of its grid body(block, thread, grid).
template <typename... Arguments, typename Body>
cudaError_t launch(void (*kernel)(Arguments...), const Body& body, int grid, const Where& where,
                   const std::common_type_t<Arguments>&... arguments) {
  if (where.on_host) {
    for (int block = 0; block < grid; ++block)
      for (int thread = 0; thread < threads_per_block; ++thread) body(block, thread, grid);
    return cudaSuccess;
  }
  kernel<<<grid, threads_per_block, 0, where.stream>>>(arguments...);
  return cudaGetLastError();
}

// What the rows of tensor i hold from that of the rounding on.
inline const void* rounding_row(const pysteep_rounding& rounding, int row, int64_t tensor, int64_t count) {
  if (rounding.mode == PYSTEEP_COMPENSATED) return rounding.compensation[row * count + tensor];
  return reinterpret_cast<const void*>(row == 0 ? static_cast<uintptr_t>(rounding.first[tensor]) : rounding.stream[tensor]);
}

// Calls run(table) with one table after the other until all tensors had their turn; address(row, tensor) is what `rows` rows
// of a table hold. `rounding` is null to the nearest; it is that of `rounded` roles.
template <typename Table, int64_t ChunkElements, typename Address, typename Run>
cudaError_t for_each_table(const typename Table::Options& options, int64_t count, const int64_t* numel, int rows,
                           const Address& address, const Run& run, const pysteep_rounding* rounding = nullptr,
                           int rounded = 0) {
  static_assert(sizeof(Table) + 64 <= largest_argument, "an op may have another argument");
  constexpr int64_t most_chunks = int64_t(1) << 30;
  Table table;
  table.options = options;
  table.rounding = {};
  const bool stochastic = rounding != nullptr && rounding->mode == PYSTEEP_STOCHASTIC;
  const int all_rows = rows + (rounding == nullptr ? 0 : stochastic ? 2 : rounded);
  if (rounding != nullptr) table.rounding = {rounding->mode, rows, rounding->seed, rounding->step};
  table.capacity = std::min(Table::most_tensors, Table::most_addresses / all_rows);
  for (int64_t tensor = 0; tensor < count;) {
    table.count = table.chunks = 0;
    for (; tensor < count && table.count < table.capacity; ++tensor) {
      const int64_t chunks = (numel[tensor] + ChunkElements - 1) / ChunkElements;
      if (chunks == 0) continue;
      if (table.chunks + chunks > most_chunks) {
        if (table.count == 0) return cudaErrorInvalidValue;  // terabytes in one tensor
        break;
      }
      const int32_t i = table.count++;
      table.numel[i] = numel[tensor];
      uintptr_t addresses = 0;
      for (int row = 0; row < all_rows; ++row) {
        const void* of_row = row < rows ? address(row, tensor) : rounding_row(*rounding, row - rows, tensor, count);
        if (row < rows || !stochastic) addresses |= reinterpret_cast<uintptr_t>(of_row);
        table.address[row * table.capacity + i] = const_cast<void*>(of_row);
      }
      table.aligned[i] = addresses % 16 == 0;
      table.first_chunk[i] = table.chunks;
      table.chunks += static_cast<int32_t>(chunks);
    }
    table.first_chunk[table.count] = table.chunks;
    if (table.chunks == 0) continue;
    const cudaError_t error = run(table);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pysteep::cuda
