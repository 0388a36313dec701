// steepest_step on NVIDIA GPUs. The arithmetic is in math/steepest_step.h.
#include "cuda/launch.h"
#include "cuda/rounding.h"
#include "cuda/vectors.h"
#include "math/steepest_step.h"

namespace pysteep::cuda {
namespace {

using Tensors = pysteep_steepest_tensors;
using Options = pysteep_steepest_options;

enum Row { weight_row, gradient_row, momentum_row };
using SteepestTable = Table<Options, PYSTEEP_CUDA_TENSORS, 3 * PYSTEEP_CUDA_TENSORS>;

// Vectors in flight a thread and operand: enough to cover memory's latency, few enough to stay in registers.
template <typename M>
constexpr int unroll = has_momentum<M> ? 2 : 4;
template <typename W, typename M>
constexpr int64_t chunk_elements = int64_t(threads_per_block) * unroll<M> * vector_elements<W>;

template <typename W, typename G, typename M, bool Rounds, int N>
struct Operands {
  Vector<W, N> weight;
  Vector<G, N> gradient;
  Vector<M, has_momentum<M> ? N : 1> momentum;
  Vector<std::conditional_t<Rounds, uint16_t, None>, Rounds ? N : 1> beside;  // the weight: cuda/rounding.h
};

// Calls visit(operands) for every element of the block's chunks, N at a time, loaded; stores what it leaves where `writes`.
template <typename W, typename G, typename M, bool Rounds, bool Writes, typename Visit>
PYSTEEP_INLINE void for_each_vector(const SteepestTable& table, int block, int thread, int grid, const Visit& visit) {
  constexpr int n = vector_elements<W>;
  for_each_chunk<chunk_elements<W, M>>(table, block, grid, [&](const Chunk& chunk) {
    W* weight = table.at<W>(weight_row, chunk.tensor);
    const G* gradient = table.at<const G>(gradient_row, chunk.tensor);
    M* momentum = has_momentum<M> ? table.at<M>(momentum_row, chunk.tensor) : nullptr;
    if (chunk.full) {
      Operands<W, G, M, Rounds, n> operands[unroll<M>];
#pragma unroll
      for (int k = 0; k < unroll<M>; ++k) {
        const int64_t at = chunk.begin + (int64_t(k) * threads_per_block + thread) * n;
        operands[k].weight = load<W, n>(weight, at);
        operands[k].gradient = load<G, n>(gradient, at);
        if constexpr (has_momentum<M>) operands[k].momentum = load<M, n>(momentum, at);
        if constexpr (Rounds) operands[k].beside = visit.rounder.template load_compensation<n>(chunk.tensor, 0, at);
      }
#pragma unroll
      for (int k = 0; k < unroll<M>; ++k) {
        const int64_t at = chunk.begin + (int64_t(k) * threads_per_block + thread) * n;
        if constexpr (Rounds && Writes) visit.rounder.draw(operands[k].beside, chunk.tensor, 0, at);
        visit(operands[k]);
        if constexpr (Writes) store(operands[k].weight, weight, at);
        if constexpr (Rounds && Writes) visit.rounder.store_compensation(operands[k].beside, chunk.tensor, 0, at);
        if constexpr (Writes && has_momentum<M>) store(operands[k].momentum, momentum, at);
      }
    } else {
#pragma unroll 1
      for (int64_t at = chunk.begin + thread; at < chunk.end; at += threads_per_block) {
        Operands<W, G, M, Rounds, 1> operands;
        operands.weight = load<W, 1>(weight, at);
        operands.gradient = load<G, 1>(gradient, at);
        if constexpr (has_momentum<M>) operands.momentum = load<M, 1>(momentum, at);
        if constexpr (Rounds) operands.beside = visit.rounder.template load_compensation<1>(chunk.tensor, 0, at);
        if constexpr (Rounds && Writes) visit.rounder.draw(operands.beside, chunk.tensor, 0, at);
        visit(operands);
        if constexpr (Writes) store(operands.weight, weight, at);
        if constexpr (Rounds && Writes) visit.rounder.store_compensation(operands.beside, chunk.tensor, 0, at);
        if constexpr (Writes && has_momentum<M>) store(operands.momentum, momentum, at);
      }
    }
  });
}

template <Power P, typename W, typename G, typename M, bool Rounds>
struct Step {
  using T = compute_t<W>;
  SteepestNumbers<T> numbers;
  Rounder<Rounds, SteepestTable> rounder;

  template <Range R, int N>
  PYSTEEP_INLINE void step_all(Operands<W, G, M, Rounds, N>& operands) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      auto& beside = operands.beside.element[Rounds ? i : 0];
      T w = rounder.widen(operands.weight.element[i], beside), m = widen(operands.momentum.element[has_momentum<M> ? i : 0]);
      const T g = widen(operands.gradient.element[i]);
      const T c = steepest_direction<has_momentum<M>>(w, g, m, numbers);
      steepest_step<has_momentum<M>>(w, g, m, signed_power<P, R>(c, logarithm<P, R>(c), numbers.exponent), numbers);
      rounder.narrow(w, operands.weight.element[i], beside);
      if constexpr (has_momentum<M>) narrow(m, operands.momentum.element[i]);
    }
  }

  template <int N>
  PYSTEEP_INLINE bool is_normal(const Operands<W, G, M, Rounds, N>& operands) const {
    auto largest = Extent<T>().largest, smallest = Extent<T>().smallest;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T w = rounder.widen(operands.weight.element[i], operands.beside.element[Rounds ? i : 0]);
      const T m = widen(operands.momentum.element[has_momentum<M> ? i : 0]), g = widen(operands.gradient.element[i]);
      const auto size = Extent<T>::size(steepest_direction<has_momentum<M>>(w, g, m, numbers));
      largest = largest > size ? largest : size;
      smallest = smallest < size - 1 ? smallest : size - 1;
    }
    return Extent<T>{largest, smallest}.is_normal();
  }

  // At general q the arithmetic of 16-bit weights takes as long as memory does.
  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, Rounds, N>& operands) const {
    if constexpr (P == Power::general && N > 1 && !Rounds) {
      if (is_normal(operands)) return step_all<Range::normal>(operands);
    }
    step_all<Range::any>(operands);
  }
};

// The power is chosen at run time here, else kernels that round were 48, not 12.
template <typename W, typename G, typename M>
struct RoundedStep {
  Power power;
  SteepestNumbers<compute_t<W>> numbers;
  AsAsked<SteepestTable> rounder;

  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, true, N>& operands) const {
    switch (power) {
      case Power::sign:
        return Step<Power::sign, W, G, M, true>{numbers, rounder}(operands);
      case Power::root:
        return Step<Power::root, W, G, M, true>{numbers, rounder}(operands);
      case Power::identity:
        return Step<Power::identity, W, G, M, true>{numbers, rounder}(operands);
      case Power::general:
        return Step<Power::general, W, G, M, true>{numbers, rounder}(operands);
    }
  }
};

// The power is chosen at run time here: a pass that only reads has the time for it, and it is a quarter of the kernels.
template <typename W, typename G, typename M>
struct PowerSum {
  using T = compute_t<W>;
  Power power;
  SteepestNumbers<T> numbers;
  double* sum;

  PYSTEEP_INLINE T direction(T c) const {
    switch (power) {
      case Power::sign:
        return signed_power<Power::sign>(c, Logarithm<T>{}, numbers.exponent);
      case Power::root:
        return signed_power<Power::root>(c, Logarithm<T>{}, numbers.exponent);
      case Power::identity:
        return c;
      default:
        return signed_power<Power::general>(c, logarithm<Power::general>(c), numbers.exponent);
    }
  }

  PYSTEEP_INLINE void add(T w, T g, T m) const {
    const T c = steepest_direction<has_momentum<M>>(w, g, m, numbers);
    *sum += double(c) * double(direction(c));  // |c|^q = c u(c)
  }

  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, false, N>& operands) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T m = widen(operands.momentum.element[has_momentum<M> ? i : 0]);
      const T w = widen(operands.weight.element[i]), g = widen(operands.gradient.element[i]);
      add(w, g, m);
    }
  }
};

template <typename W, typename G, typename M>
struct CompensatedPowerSum {
  PowerSum<W, G, M> total;
  AsAsked<SteepestTable> rounder;

  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, true, N>& operands) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float m = widen(operands.momentum.element[has_momentum<M> ? i : 0]);
      const float w = rounder.widen(operands.weight.element[i], operands.beside.element[i]);
      total.add(w, widen(operands.gradient.element[i]), m);
    }
  }
};

template <Power P, typename W, typename G, typename M>
PYSTEEP_INLINE void step_body(const SteepestTable& table, int block, int thread, int grid) {
  if (read(table.options.found_inf) != 0) return;
  const Step<P, W, G, M, false> visit{steepest_numbers<compute_t<W>>(table.options), ToNearest(table)};
  for_each_vector<W, G, M, false, true>(table, block, thread, grid, visit);
}

template <typename W, typename G, typename M>
PYSTEEP_INLINE void rounded_step_body(const SteepestTable& table, int block, int thread, int grid) {
  if (read(table.options.found_inf) != 0) return;
  const RoundedStep<W, G, M> visit{power_of(table.options.q), steepest_numbers<compute_t<W>>(table.options), AsAsked(table)};
  for_each_vector<W, G, M, true, true>(table, block, thread, grid, visit);
}

template <typename W, typename G, typename M, bool Rounds>
PYSTEEP_INLINE void power_sum_body(const SteepestTable& table, double* partial_sums, int block, int thread, int grid) {
  double sum = 0;
  const PowerSum<W, G, M> visit{power_of(table.options.q), steepest_numbers<compute_t<W>>(table.options), &sum};
  if constexpr (Rounds)
    for_each_vector<W, G, M, true, false>(table, block, thread, grid, CompensatedPowerSum<W, G, M>{visit, AsAsked(table)});
  else
    for_each_vector<W, G, M, false, false>(table, block, thread, grid, visit);
  partial_sums[int64_t(block) * threads_per_block + thread] += sum;
}

// Blocks of a multiprocessor, at general q as many as registers allow: those of gradients wider than weights do not.
template <Power P, typename W, typename G>
constexpr int fewest_blocks = P == Power::general && std::is_same_v<W, G> ? 3 : 2;

template <Power P, typename W, typename G, typename M>
__global__ void __launch_bounds__(threads_per_block, fewest_blocks<P, W, G>)
    steepest_step_kernel(const __grid_constant__ SteepestTable table) {
  step_body<P, W, G, M>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename W, typename G, typename M>
__global__ void __launch_bounds__(threads_per_block, 2) rounded_step_kernel(const __grid_constant__ SteepestTable table) {
  rounded_step_body<W, G, M>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename W, typename G, typename M, bool Rounds>
__global__ void __launch_bounds__(threads_per_block, 2)
    steepest_power_sum_kernel(const __grid_constant__ SteepestTable table, double* partial_sums) {
  power_sum_body<W, G, M, Rounds>(table, partial_sums, blockIdx.x, threadIdx.x, gridDim.x);
}

template <Power P, typename W, typename G, typename M>
cudaError_t run_step(const SteepestTable& table, const Where& where) {
  const auto body = [&](int block, int thread, int grid) { step_body<P, W, G, M>(table, block, thread, grid); };
  return launch(steepest_step_kernel<P, W, G, M>, body, grid_blocks(where, table.chunks), where, table);
}

template <typename W, typename G, typename M>
cudaError_t run_rounded_step(const SteepestTable& table, const Where& where) {
  const auto body = [&](int block, int thread, int grid) { rounded_step_body<W, G, M>(table, block, thread, grid); };
  return launch(rounded_step_kernel<W, G, M>, body, grid_blocks(where, table.chunks), where, table);
}

template <typename W, typename G, typename M, bool Rounds>
cudaError_t run_power_sum(const SteepestTable& table, double* partial_sums, const Where& where) {
  const auto body = [&](int block, int thread, int grid) {
    power_sum_body<W, G, M, Rounds>(table, partial_sums, block, thread, grid);
  };
  const int grid = grid_blocks(where, table.chunks, PYSTEEP_CUDA_PARTIAL_SUMS / threads_per_block);
  return launch(steepest_power_sum_kernel<W, G, M, Rounds>, body, grid, where, table, partial_sums);
}

// The power sum where there are partial_sums to add to, else the step.
template <typename W, typename G, typename M>
cudaError_t run_table(const SteepestTable& table, double* partial_sums, const Where& where) {
  if constexpr (sizeof(W) == 2) {
    if (table.rounding.mode != PYSTEEP_NEAREST)
      return partial_sums != nullptr ? run_power_sum<W, G, M, true>(table, partial_sums, where)
                                     : run_rounded_step<W, G, M>(table, where);
  }
  if (partial_sums != nullptr) return run_power_sum<W, G, M, false>(table, partial_sums, where);
  switch (power_of(table.options.q)) {
    case Power::sign:
      return run_step<Power::sign, W, G, M>(table, where);
    case Power::root:
      return run_step<Power::root, W, G, M>(table, where);
    case Power::identity:
      return run_step<Power::identity, W, G, M>(table, where);
    case Power::general:
      return run_step<Power::general, W, G, M>(table, where);
  }
  return cudaErrorInvalidValue;
}

// A call beside its tensors.
struct Call {
  Options options;
  const pysteep_rounding* rounding;  // null: to the nearest
  double* partial_sums;
  Where where;
};

template <typename W, typename G, typename M>
cudaError_t run_all(const Tensors& tensors, const Call& call) {
  const auto address = [&](int row, int64_t tensor) -> const void* {
    return row == weight_row     ? tensors.weight[tensor]
           : row == gradient_row ? tensors.gradient[tensor]
                                 : tensors.momentum[tensor];
  };
  return for_each_table<SteepestTable, chunk_elements<W, M>>(
      call.options, tensors.count, tensors.numel, has_momentum<M> ? 3 : 2, address,
      [&](const SteepestTable& table) { return run_table<W, G, M>(table, call.partial_sums, call.where); }, call.rounding, 1);
}

template <typename W, typename G>
cudaError_t run_momentum(const Tensors& tensors, const Call& call) {
  if (tensors.momentum == nullptr) return run_all<W, G, None>(tensors, call);
  if (tensors.momentum_dtype == tensors.weight_dtype) return run_all<W, G, W>(tensors, call);
  if constexpr (sizeof(W) == 2)
    if (tensors.momentum_dtype == PYSTEEP_FLOAT32) return run_all<W, G, float>(tensors, call);
  return cudaErrorInvalidValue;
}

template <typename W>
cudaError_t run_gradient(const Tensors& tensors, const Call& call) {
  if (tensors.gradient_dtype == tensors.weight_dtype) return run_momentum<W, W>(tensors, call);
  if constexpr (sizeof(W) == 2)
    if (tensors.gradient_dtype == PYSTEEP_FLOAT32) return run_momentum<W, float>(tensors, call);
  return cudaErrorInvalidValue;
}

cudaError_t run(const Tensors& tensors, const Call& call) {
  if (const cudaError_t error = select_device(call.where); error != cudaSuccess) return error;
  switch (tensors.weight_dtype) {
    case PYSTEEP_FLOAT16:
      return run_gradient<float16>(tensors, call);
    case PYSTEEP_BFLOAT16:
      return run_gradient<bfloat16>(tensors, call);
    case PYSTEEP_FLOAT32:
      return run_gradient<float>(tensors, call);
    case PYSTEEP_FLOAT64:
      return run_gradient<double>(tensors, call);
    case PYSTEEP_INT16:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_steepest_step_cuda(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                               const pysteep_rounding* rounding, int device, void* stream) {
  using namespace pysteep::cuda;
  const pysteep_rounding* other = other_than_nearest(rounding, tensors->weight_dtype);
  return run(*tensors, {*options, other, nullptr, {false, device, static_cast<cudaStream_t>(stream)}});
}

int pysteep_steepest_power_sum_cuda(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                    const pysteep_rounding* rounding, double* partial_sums, int device, void* stream) {
  using namespace pysteep::cuda;
  const pysteep_rounding* of_reading = compensated(rounding, tensors->weight_dtype);
  return run(*tensors, {*options, of_reading, partial_sums, {false, device, static_cast<cudaStream_t>(stream)}});
}

int pysteep_steepest_step_cuda_on_host(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                       const pysteep_rounding* rounding) {
  using namespace pysteep::cuda;
  return run(*tensors, {*options, other_than_nearest(rounding, tensors->weight_dtype), nullptr, {true, 0, nullptr}});
}

int pysteep_steepest_power_sum_cuda_on_host(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                            const pysteep_rounding* rounding, double* partial_sums) {
  using namespace pysteep::cuda;
  return run(*tensors, {*options, compensated(rounding, tensors->weight_dtype), partial_sums, {true, 0, nullptr}});
}

const char* pysteep_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
