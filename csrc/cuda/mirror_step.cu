// mirror_step on NVIDIA GPUs. The arithmetic is in math/mirror_step.h.
#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "math/mirror_step.h"

namespace pysteep::cuda {
namespace {

using Tensors = pysteep_mirror_tensors;

struct Options {
  pysteep_steepest_options each;
  int64_t depth;
  double at_one;  // mirror_at_one(depth)
  pysteep_dtype weight, gradient;
};
enum Row { weight_row, gradient_row, balance_row, rows };
using MirrorTable = Table<Options, 512, rows * 512>;

// Elements of a thread: 16 bytes of 16-bit weights, 32 of float. The arithmetic takes longer than memory does, so that the
// storage types and the power are told apart at run time.
template <typename T>
constexpr int elements = sizeof(T) == 8 ? 2 : 8;
template <typename T>
constexpr int64_t chunk_elements = int64_t(threads_per_block) * elements<T>;

template <typename T>
PYSTEEP_INLINE void mirror_step_body(const MirrorTable& table, int block, int thread, int grid) {
  constexpr int n = elements<T>;
  const Options& options = table.options;
  if (read(options.each.found_inf) != 0) return;
  const Power power = power_of(options.each.q);
  MirrorNumbers<T> numbers = mirror_numbers<T>(options.each, options.depth, options.at_one);
  for_each_chunk<chunk_elements<T>>(table, block, grid, [&](const Chunk& chunk) {
    numbers.balance = T(*table.template at<const double>(balance_row, chunk.tensor));
    void* weight = table.template at<void>(weight_row, chunk.tensor);
    const void* gradient = table.template at<const void>(gradient_row, chunk.tensor);
    int64_t at = chunk.begin + int64_t(thread) * (chunk.full ? n : 1);
    const int64_t stride = chunk.full ? chunk_elements<T> : threads_per_block;
#pragma unroll 1
    for (; at < chunk.end; at += stride) {
      Turning<T, n, 1> x, g;
      if (chunk.full) {
        x = Turning<T, n, 1>(load_widened<T, n>(options.weight, weight, at));
        g = Turning<T, n, 1>(load_widened<T, n>(options.gradient, gradient, at));
      } else {
        x = x.of_one(load_widened<T, 1>(options.weight, weight, at).element[0]);
        g = g.of_one(load_widened<T, 1>(options.gradient, gradient, at).element[0]);
      }
#pragma unroll 1
      for (int turn = 0; turn < n; ++turn) {
        x.set(0, mirror_step(power, x.get(0), g.get(0), options.depth, numbers));
        if (!chunk.full) break;
        x.turn();
        g.turn();
      }
      if (chunk.full)
        store_narrowed<T, n>(options.weight, x.vector(), weight, at);
      else
        store_narrowed<T, 1>(options.weight, {x.get(0)}, weight, at);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(threads_per_block, sizeof(T) == 4 ? 3 : 2)
    mirror_step_kernel(const __grid_constant__ MirrorTable table) {
  mirror_step_body<T>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename T>
cudaError_t run_all(const Tensors& tensors, const Options& options, const Where& where) {
  const auto address = [&](int row, int64_t tensor) -> const void* {
    return row == weight_row     ? tensors.weight[tensor]
           : row == gradient_row ? tensors.gradient[tensor]
                                 : static_cast<const void*>(tensors.balance[tensor]);
  };
  return for_each_table<MirrorTable, chunk_elements<T>>(
      options, tensors.count, tensors.numel, rows, address, [&](const MirrorTable& table) {
        const auto body = [&](int block, int thread, int grid) { mirror_step_body<T>(table, block, thread, grid); };
        return launch(mirror_step_kernel<T>, body, grid_blocks(where, table.chunks), where, table);
      });
}

cudaError_t run(const Tensors& tensors, const pysteep_steepest_options& options, const Where& where) {
  const bool fits = tensors.gradient_dtype == tensors.weight_dtype ||
                    (tensors.gradient_dtype == PYSTEEP_FLOAT32 && tensors.weight_dtype != PYSTEEP_FLOAT64);
  if (!fits || tensors.depth < 2) return cudaErrorInvalidValue;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  const Options all{options, tensors.depth, mirror_at_one(tensors.depth), tensors.weight_dtype, tensors.gradient_dtype};
  return tensors.weight_dtype == PYSTEEP_FLOAT64 ? run_all<double>(tensors, all, where) : run_all<float>(tensors, all, where);
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_mirror_step_cuda(const pysteep_mirror_tensors* tensors, const pysteep_steepest_options* options,
                             const pysteep_rounding* rounding, int device, void* stream) {
  if (rounding->mode != PYSTEEP_NEAREST) return cudaErrorInvalidValue;
  return pysteep::cuda::run(*tensors, *options, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_mirror_step_cuda_on_host(const pysteep_mirror_tensors* tensors, const pysteep_steepest_options* options,
                                     const pysteep_rounding* rounding) {
  if (rounding->mode != PYSTEEP_NEAREST) return cudaErrorInvalidValue;
  return pysteep::cuda::run(*tensors, *options, {true, 0, nullptr});
}

}  // extern "C"
