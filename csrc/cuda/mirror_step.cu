// mirror_step on NVIDIA GPUs. The arithmetic is in math/mirror_step.h.
#include "cuda/launch.h"
#include "cuda/rounding.h"
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

// N weights of 16 bits, with what the rounder has beside them.
template <int N>
PYSTEEP_INLINE Vector<float, N> load_rounded(const AsAsked<MirrorTable>& rounder, const Vector<uint16_t, N>& beside,
                                             const void* address, int64_t at) {
  const auto load_as = [&](auto storage) {
    const auto stored = load<decltype(storage), N>(address, at);
    Vector<float, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.element[i] = rounder.widen(stored.element[i], beside.element[i]);
    return result;
  };
  return rounder.table.options.weight == PYSTEEP_FLOAT16 ? load_as(float16{}) : load_as(bfloat16{});
}

template <int N>
PYSTEEP_INLINE void store_rounded(const AsAsked<MirrorTable>& rounder, const Vector<float, N>& values,
                                  Vector<uint16_t, N>& beside, void* address, int64_t at) {
  const auto store_as = [&](auto storage) {
    Vector<decltype(storage), N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) rounder.narrow(values.element[i], stored.element[i], beside.element[i]);
    store(stored, address, at);
  };
  rounder.table.options.weight == PYSTEEP_FLOAT16 ? store_as(float16{}) : store_as(bfloat16{});
}

// The N weights of a tensor from `at` on; random numbers are drawn when they are stored.
template <bool Rounds, typename T, int N>
PYSTEEP_INLINE Vector<T, N> load_weights(const Rounder<Rounds, MirrorTable>& rounder, pysteep_dtype dtype, const void* weight,
                                         int tensor, int64_t at) {
  if constexpr (Rounds)
    return load_rounded<N>(rounder, rounder.template load_compensation<N>(tensor, 0, at), weight, at);
  else
    return load_widened<T, N>(dtype, weight, at);
}

template <bool Rounds, typename T, int N>
PYSTEEP_INLINE void store_weights(const Rounder<Rounds, MirrorTable>& rounder, pysteep_dtype dtype, const Vector<T, N>& values,
                                  void* weight, int tensor, int64_t at) {
  if constexpr (Rounds) {
    Vector<uint16_t, N> beside{};
    rounder.draw(beside, tensor, 0, at);
    store_rounded(rounder, values, beside, weight, at);
    rounder.store_compensation(beside, tensor, 0, at);
  } else {
    store_narrowed<T, N>(dtype, values, weight, at);
  }
}

template <typename T, bool Rounds>
PYSTEEP_INLINE void mirror_step_body(const MirrorTable& table, int block, int thread, int grid) {
  constexpr int n = elements<T>;
  const Options& options = table.options;
  if (read(options.each.found_inf) != 0) return;
  const Power power = power_of(options.each.q);
  MirrorNumbers<T> numbers = mirror_numbers<T>(options.each, options.depth, options.at_one);
  const Rounder<Rounds, MirrorTable> rounder(table);
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
        x = Turning<T, n, 1>(load_weights<Rounds, T, n>(rounder, options.weight, weight, chunk.tensor, at));
        g = Turning<T, n, 1>(load_widened<T, n>(options.gradient, gradient, at));
      } else {
        x = x.of_one(load_weights<Rounds, T, 1>(rounder, options.weight, weight, chunk.tensor, at).element[0]);
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
        store_weights<Rounds, T, n>(rounder, options.weight, x.vector(), weight, chunk.tensor, at);
      else
        store_weights<Rounds, T, 1>(rounder, options.weight, {x.get(0)}, weight, chunk.tensor, at);
    }
  });
}

template <typename T, bool Rounds>
__global__ void __launch_bounds__(threads_per_block, sizeof(T) == 4 ? 3 : 2)
    mirror_step_kernel(const __grid_constant__ MirrorTable table) {
  mirror_step_body<T, Rounds>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename T, bool Rounds>
cudaError_t run_all(const Tensors& tensors, const Options& options, const pysteep_rounding* rounding, const Where& where) {
  const auto address = [&](int row, int64_t tensor) -> const void* {
    return row == weight_row     ? tensors.weight[tensor]
           : row == gradient_row ? tensors.gradient[tensor]
                                 : static_cast<const void*>(tensors.balance[tensor]);
  };
  return for_each_table<MirrorTable, chunk_elements<T>>(
      options, tensors.count, tensors.numel, rows, address,
      [&](const MirrorTable& table) {
        const auto body = [&](int block, int thread, int grid) { mirror_step_body<T, Rounds>(table, block, thread, grid); };
        return launch(mirror_step_kernel<T, Rounds>, body, grid_blocks(where, table.chunks), where, table);
      },
      rounding, 1);
}

cudaError_t run(const Tensors& tensors, const pysteep_steepest_options& options, const pysteep_rounding& rounding,
                const Where& where) {
  const bool fits = tensors.gradient_dtype == tensors.weight_dtype ||
                    (tensors.gradient_dtype == PYSTEEP_FLOAT32 && tensors.weight_dtype != PYSTEEP_FLOAT64);
  if (!fits || tensors.depth < 2) return cudaErrorInvalidValue;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  const Options all{options, tensors.depth, mirror_at_one(tensors.depth), tensors.weight_dtype, tensors.gradient_dtype};
  const pysteep_rounding* other = other_than_nearest(&rounding, tensors.weight_dtype);
  if (tensors.weight_dtype == PYSTEEP_FLOAT64) return run_all<double, false>(tensors, all, nullptr, where);
  return other == nullptr ? run_all<float, false>(tensors, all, nullptr, where)
                          : run_all<float, true>(tensors, all, other, where);
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_mirror_step_cuda(const pysteep_mirror_tensors* tensors, const pysteep_steepest_options* options,
                             const pysteep_rounding* rounding, int device, void* stream) {
  return pysteep::cuda::run(*tensors, *options, *rounding, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_mirror_step_cuda_on_host(const pysteep_mirror_tensors* tensors, const pysteep_steepest_options* options,
                                     const pysteep_rounding* rounding) {
  return pysteep::cuda::run(*tensors, *options, *rounding, {true, 0, nullptr});
}

}  // extern "C"
