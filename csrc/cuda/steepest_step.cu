// steepest_step on NVIDIA GPUs. The arithmetic is in math/steepest_step.h; the bodies below need no barrier, so they are plain
// functions of (block, thread, grid) that the CPU can run as well.
#include <type_traits>

#include "cuda/launch.h"
#include "math/steepest_step.h"

namespace pysteep::cuda {
namespace {

using Tensors = pysteep_steepest_tensors;
using Options = pysteep_steepest_options;

// Kernel arguments: many tensors, cut into chunks.
struct Table {
  static constexpr int capacity = PYSTEEP_CUDA_TENSORS;
  Options options;
  int32_t count, chunks;
  int64_t numel[capacity];
  void* weight[capacity];
  const void* gradient[capacity];
  void* momentum[capacity];
  int32_t first_chunk[capacity + 1];
};
static_assert(sizeof(Table) <= 32764, "the limit of kernel arguments");

struct None {};  // the momentum's storage type when there is none
template <typename M>
constexpr bool has_momentum = !std::is_same_v<M, None>;
using pysteep::widen;
PYSTEEP_INLINE float widen(None) { return 0.0f; }

// Vectors in flight a thread and operand: enough to cover memory's latency, few enough to stay in registers.
template <typename M>
constexpr int unroll = has_momentum<M> ? 2 : 4;
template <typename W, typename M>
constexpr int64_t chunk_elements = int64_t(threads_per_block) * unroll<M> * vector_elements<W>;

template <typename W, typename G, typename M, int N>
struct Operands {
  Vector<W, N> weight;
  Vector<G, N> gradient;
  Vector<M, has_momentum<M> ? N : 1> momentum;
};

// Calls visit(operands) for every element of the block's chunks, N at a time, loaded; stores what it leaves where `writes`.
template <typename W, typename G, typename M, bool Writes, typename Visit>
PYSTEEP_INLINE void for_each_vector(const Table& table, int block, int thread, int grid, const Visit& visit) {
  constexpr int n = vector_elements<W>;
  constexpr int64_t chunk_size = chunk_elements<W, M>;
  for (int32_t chunk = block; chunk < table.chunks; chunk += grid) {
    const int tensor = tensor_of_chunk(table.first_chunk, table.count, chunk);
    const int64_t begin = (chunk - table.first_chunk[tensor]) * chunk_size;
    const int64_t end = begin + chunk_size < table.numel[tensor] ? begin + chunk_size : table.numel[tensor];
    W* weight = static_cast<W*>(table.weight[tensor]);
    const G* gradient = static_cast<const G*>(table.gradient[tensor]);
    M* momentum = static_cast<M*>(table.momentum[tensor]);
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(gradient) |
                                (has_momentum<M> ? reinterpret_cast<uintptr_t>(momentum) : 0);
    if (addresses % 16 == 0 && end - begin == chunk_size) {
      Operands<W, G, M, n> operands[unroll<M>];
#pragma unroll
      for (int k = 0; k < unroll<M>; ++k) {
        const int64_t at = begin + (int64_t(k) * threads_per_block + thread) * n;
        operands[k].weight = *reinterpret_cast<const Vector<W, n>*>(weight + at);
        operands[k].gradient = *reinterpret_cast<const Vector<G, n>*>(gradient + at);
        if constexpr (has_momentum<M>) operands[k].momentum = *reinterpret_cast<const Vector<M, n>*>(momentum + at);
      }
#pragma unroll
      for (int k = 0; k < unroll<M>; ++k) {
        const int64_t at = begin + (int64_t(k) * threads_per_block + thread) * n;
        visit(operands[k]);
        if constexpr (Writes) *reinterpret_cast<Vector<W, n>*>(weight + at) = operands[k].weight;
        if constexpr (Writes && has_momentum<M>) *reinterpret_cast<Vector<M, n>*>(momentum + at) = operands[k].momentum;
      }
    } else {
      for (int64_t at = begin + thread; at < end; at += threads_per_block) {
        Operands<W, G, M, 1> operands;
        operands.weight.element[0] = weight[at];
        operands.gradient.element[0] = gradient[at];
        if constexpr (has_momentum<M>) operands.momentum.element[0] = momentum[at];
        visit(operands);
        if constexpr (Writes) weight[at] = operands.weight.element[0];
        if constexpr (Writes && has_momentum<M>) momentum[at] = operands.momentum.element[0];
      }
    }
  }
}

template <Power P, typename W, typename G, typename M>
struct Step {
  using T = compute_t<W>;
  SteepestNumbers<T> numbers;

  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, N>& operands) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T w = widen(operands.weight.element[i]), m = widen(operands.momentum.element[has_momentum<M> ? i : 0]);
      const T g = widen(operands.gradient.element[i]);
      const T c = steepest_direction<has_momentum<M>>(w, g, m, numbers);
      steepest_step<has_momentum<M>>(w, g, m, signed_power<P>(c, logarithm<P>(c), numbers.exponent), numbers);
      narrow(w, operands.weight.element[i]);
      if constexpr (has_momentum<M>) narrow(m, operands.momentum.element[i]);
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

  template <int N>
  PYSTEEP_INLINE void operator()(Operands<W, G, M, N>& operands) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T m = widen(operands.momentum.element[has_momentum<M> ? i : 0]);
      const T w = widen(operands.weight.element[i]), g = widen(operands.gradient.element[i]);
      const T c = steepest_direction<has_momentum<M>>(w, g, m, numbers);
      *sum += double(c) * double(direction(c));  // |c|^q = c u(c)
    }
  }
};

template <Power P, typename W, typename G, typename M>
PYSTEEP_INLINE void step_body(const Table& table, int block, int thread, int grid) {
  if (read(table.options.found_inf) != 0) return;
  for_each_vector<W, G, M, true>(table, block, thread, grid, Step<P, W, G, M>{steepest_numbers<compute_t<W>>(table.options)});
}

template <typename W, typename G, typename M>
PYSTEEP_INLINE void power_sum_body(const Table& table, double* partial_sums, int block, int thread, int grid) {
  double sum = 0;
  const PowerSum<W, G, M> visit{power_of(table.options.q), steepest_numbers<compute_t<W>>(table.options), &sum};
  for_each_vector<W, G, M, false>(table, block, thread, grid, visit);
  partial_sums[int64_t(block) * threads_per_block + thread] += sum;
}

template <Power P, typename W, typename G, typename M>
__global__ void __launch_bounds__(threads_per_block, 2) steepest_step_kernel(const __grid_constant__ Table table) {
  step_body<P, W, G, M>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

template <typename W, typename G, typename M>
__global__ void __launch_bounds__(threads_per_block, 2)
    steepest_power_sum_kernel(const __grid_constant__ Table table, double* partial_sums) {
  power_sum_body<W, G, M>(table, partial_sums, blockIdx.x, threadIdx.x, gridDim.x);
}

struct Where {
  bool on_host;
  int device;
  cudaStream_t stream;
};

// Calls body(block, thread, grid) as a grid would; fewer blocks than chunks, so that a block takes several.
template <typename Body>
cudaError_t run_on_host(int32_t chunks, const Body& body) {
  const int grid = std::min<int32_t>(chunks, 3);
  for (int block = 0; block < grid; ++block)
    for (int thread = 0; thread < threads_per_block; ++thread) body(block, thread, grid);
  return cudaSuccess;
}

template <Power P, typename W, typename G, typename M>
cudaError_t run_step(const Table& table, const Where& where) {
  if (where.on_host)
    return run_on_host(table.chunks,
                       [&](int block, int thread, int grid) { step_body<P, W, G, M>(table, block, thread, grid); });
  steepest_step_kernel<P, W, G, M><<<grid_blocks(where.device, table.chunks), threads_per_block, 0, where.stream>>>(table);
  return cudaGetLastError();
}

template <typename W, typename G, typename M>
cudaError_t run_power_sum(const Table& table, double* partial_sums, const Where& where) {
  constexpr int largest_grid = PYSTEEP_CUDA_PARTIAL_SUMS / threads_per_block;
  if (where.on_host)
    return run_on_host(table.chunks, [&](int block, int thread, int grid) {
      power_sum_body<W, G, M>(table, partial_sums, block, thread, grid);
    });
  const int grid = std::min(grid_blocks(where.device, table.chunks), largest_grid);
  steepest_power_sum_kernel<W, G, M><<<grid, threads_per_block, 0, where.stream>>>(table, partial_sums);
  return cudaGetLastError();
}

// The power sum where there are partial_sums to add to, else the step.
template <typename W, typename G, typename M>
cudaError_t run_table(const Table& table, double* partial_sums, const Where& where) {
  if (partial_sums != nullptr) return run_power_sum<W, G, M>(table, partial_sums, where);
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

// Launches for tensors from `tensor` on, as many as the table and the grid hold; `tensor` moves behind them.
template <typename W, typename G, typename M>
cudaError_t run_some(const Tensors& tensors, const Options& options, int64_t& tensor, double* partial_sums,
                     const Where& where) {
  Table table;
  table.options = options;
  table.count = table.chunks = 0;
  for (; tensor < tensors.count && table.count < Table::capacity; ++tensor) {
    const int64_t chunks = (tensors.numel[tensor] + chunk_elements<W, M> - 1) / chunk_elements<W, M>;
    if (chunks == 0) continue;
    if (table.chunks + chunks > INT32_MAX) {
      if (table.count == 0) return cudaErrorInvalidValue;  // more than 2^31 chunks: some 8 TiB in one tensor
      break;
    }
    const int32_t i = table.count++;
    table.numel[i] = tensors.numel[tensor];
    table.weight[i] = tensors.weight[tensor];
    table.gradient[i] = tensors.gradient[tensor];
    table.momentum[i] = tensors.momentum == nullptr ? nullptr : tensors.momentum[tensor];
    table.first_chunk[i] = table.chunks;
    table.chunks += static_cast<int32_t>(chunks);
  }
  table.first_chunk[table.count] = table.chunks;
  return table.chunks == 0 ? cudaSuccess : run_table<W, G, M>(table, partial_sums, where);
}

template <typename W, typename G, typename M>
cudaError_t run_all(const Tensors& tensors, const Options& options, double* partial_sums, const Where& where) {
  for (int64_t tensor = 0; tensor < tensors.count;) {
    const cudaError_t error = run_some<W, G, M>(tensors, options, tensor, partial_sums, where);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename W, typename G>
cudaError_t run_momentum(const Tensors& tensors, const Options& options, double* partial_sums, const Where& where) {
  if (tensors.momentum == nullptr) return run_all<W, G, None>(tensors, options, partial_sums, where);
  if (tensors.momentum_dtype == tensors.weight_dtype) return run_all<W, G, W>(tensors, options, partial_sums, where);
  if constexpr (sizeof(W) == 2)
    if (tensors.momentum_dtype == PYSTEEP_FLOAT32) return run_all<W, G, float>(tensors, options, partial_sums, where);
  return cudaErrorInvalidValue;
}

template <typename W>
cudaError_t run_gradient(const Tensors& tensors, const Options& options, double* partial_sums, const Where& where) {
  if (tensors.gradient_dtype == tensors.weight_dtype) return run_momentum<W, W>(tensors, options, partial_sums, where);
  if constexpr (sizeof(W) == 2)
    if (tensors.gradient_dtype == PYSTEEP_FLOAT32) return run_momentum<W, float>(tensors, options, partial_sums, where);
  return cudaErrorInvalidValue;
}

cudaError_t run(const Tensors& tensors, const Options& options, double* partial_sums, const Where& where) {
  if (!where.on_host) {
    const cudaError_t error = cudaSetDevice(where.device);
    if (error != cudaSuccess) return error;
  }
  switch (tensors.weight_dtype) {
    case PYSTEEP_FLOAT16:
      return run_gradient<float16>(tensors, options, partial_sums, where);
    case PYSTEEP_BFLOAT16:
      return run_gradient<bfloat16>(tensors, options, partial_sums, where);
    case PYSTEEP_FLOAT32:
      return run_gradient<float>(tensors, options, partial_sums, where);
    case PYSTEEP_FLOAT64:
      return run_gradient<double>(tensors, options, partial_sums, where);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_steepest_step_cuda(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options, int device,
                               void* stream) {
  return pysteep::cuda::run(*tensors, *options, nullptr, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_steepest_power_sum_cuda(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                    double* partial_sums, int device, void* stream) {
  return pysteep::cuda::run(*tensors, *options, partial_sums, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_steepest_step_cuda_on_host(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options) {
  return pysteep::cuda::run(*tensors, *options, nullptr, {true, 0, nullptr});
}

int pysteep_steepest_power_sum_cuda_on_host(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                            double* partial_sums) {
  return pysteep::cuda::run(*tensors, *options, partial_sums, {true, 0, nullptr});
}

const char* pysteep_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
