// diagonal_flow on NVIDIA GPUs. The arithmetic is in math/diagonal_flow.h. A block keeps one run for all its steps, in shared
// memory, the data too where they fit. A step has two phases, of rows and of coordinates; all threads of a block wait for each
// other between them, and where the host runs the code it runs one phase after the other.
#include <vector>

#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "math/diagonal_flow.h"

namespace pysteep::cuda {
namespace {

using Flows = pysteep_diagonal_flows;

constexpr int threads_per_run = 128;

// A run of a block. A row of the data has an odd stride in shared memory: its threads then use distinct banks. What all threads
// read at once, x and the slopes, begins at 16 bytes and is read so: reading shared memory is most of a step.
template <typename T>
struct Run {
  T *x, *slopes;             // n; a number for each row of a step
  T *first, *rest, *others;  // n each; others = r^(L-2)
  T* moments;                // 4 n
  T* y;                      // k
  T* copied;                 // Z, where it fits
  int32_t* drawn;            // for each row of a step, which it is

  static PYSTEEP_INLINE int64_t padded(int64_t count) { return (count + 3) / 4 * 4; }
  static PYSTEEP_INLINE int64_t stride(int64_t n) { return n | 1; }
  static int64_t bytes(const Flows& flows, bool with_data) {
    const int64_t n = flows.n, rows = flows.batch_size == 0 ? flows.k : flows.batch_size;
    const int64_t numbers = padded(n) + padded(rows) + 7 * n + flows.k + (with_data ? flows.k * stride(n) : 0);
    return numbers * int64_t(sizeof(T)) + rows * int64_t(sizeof(int32_t));
  }

  PYSTEEP_INLINE Run(const Flows& flows, void* memory, bool with_data) {
    const int64_t n = flows.n, rows = flows.batch_size == 0 ? flows.k : flows.batch_size;
    x = static_cast<T*>(memory);
    slopes = x + padded(n);
    first = slopes + padded(rows);
    rest = first + n;
    others = rest + n;
    moments = others + n;
    y = moments + 4 * n;
    copied = y + flows.k;
    drawn = reinterpret_cast<int32_t*>(copied + (with_data ? flows.k * stride(n) : 0));
  }
};

template <typename T>
PYSTEEP_INLINE void fill_product(const Run<T>& run, int64_t depth, int64_t l) {
  if (depth > 1) run.others[l] = integer_power(run.rest[l], depth - 2);
  run.x[l] = depth > 1 ? tied_product(run.first[l], run.rest[l], run.others[l]) : run.first[l];
}

template <bool WithData, typename T>
PYSTEEP_INLINE void load_phase(const Flows& flows, int64_t index, int thread, const Run<T>& run) {
  const int64_t n = flows.n, problem = flows.problem[index];
  for (int64_t l = thread; l < n; l += threads_per_run) {
    run.first[l] = static_cast<const T*>(flows.first)[index * n + l];
    run.rest[l] = static_cast<const T*>(flows.rest)[index * n + l];
    for (int i = 0; i < 4 && flows.moments != nullptr; ++i)
      run.moments[i * n + l] = static_cast<const T*>(flows.moments)[(i * flows.runs + index) * n + l];
    fill_product(run, flows.depth[index], l);
  }
  for (int64_t i = thread; i < flows.k; i += threads_per_run) run.y[i] = static_cast<const T*>(flows.y)[problem * flows.k + i];
  for (int64_t at = thread; WithData && at < flows.k * n; at += threads_per_run)
    run.copied[at / n * run.stride(n) + at % n] = static_cast<const T*>(flows.Z)[problem * flows.k * n + at];
}

template <typename T>
PYSTEEP_INLINE void store_phase(const Flows& flows, int64_t index, int thread, const Run<T>& run) {
  const int64_t n = flows.n;
  for (int64_t l = thread; l < n; l += threads_per_run) {
    static_cast<T*>(flows.first)[index * n + l] = run.first[l];
    static_cast<T*>(flows.rest)[index * n + l] = run.rest[l];
    for (int i = 0; i < 4 && flows.moments != nullptr; ++i)
      static_cast<T*>(flows.moments)[(i * flows.runs + index) * n + l] = run.moments[i * n + l];
  }
}

// The data as a step reads them.
template <bool WithData, typename T>
struct Rows {
  const T* Z;
  int stride;

  PYSTEEP_INLINE Rows(const Flows& flows, int64_t index, const Run<T>& run)
      : Z(WithData ? run.copied : static_cast<const T*>(flows.Z) + flows.problem[index] * flows.k * flows.n),
        stride(static_cast<int>(WithData ? run.stride(flows.n) : flows.n)) {}
};

// The sum of numbers[i] * other(i), in this order; `numbers` begins at 16 bytes.
template <typename T, typename Other>
PYSTEEP_INLINE T sum_of_products(const T* numbers, int count, const Other& other) {
  constexpr int n = vector_elements<T>;
  T sum = T(0);
  int i = 0;
#pragma unroll 2
  for (; i + n <= count; i += n) {
    const Vector<T, n> several = *reinterpret_cast<const Vector<T, n>*>(numbers + i);
#pragma unroll
    for (int j = 0; j < n; ++j) sum = sum + several.element[j] * other(i + j);
  }
#pragma unroll 1
  for (; i < count; ++i) sum = sum + numbers[i] * other(i);
  return sum;
}

template <bool WithData, typename T>
PYSTEEP_INLINE void rows_phase(const Flows& flows, int64_t index, int64_t step, int thread, const Run<T>& run) {
  const Rows<WithData, T> data(flows, index, run);
  const int64_t count = flows.batch_size == 0 ? flows.k : flows.batch_size;
  const T weight = flows.mean != 0 ? T(1.0 / double(count)) : T(1);
  for (int64_t j = thread; j < count; j += threads_per_run) {
    const int64_t row = flows.batch_size == 0 ? j : drawn_row(flows.seed[index], step, j, flows.k);
    const T* of_row = data.Z + row * data.stride;
    const T prediction = sum_of_products(run.x, static_cast<int>(flows.n), [&](int l) { return of_row[l]; });
    run.slopes[j] = flows.loss == PYSTEEP_MEAN_SQUARE ? mean_square_slope(prediction, run.y[row], weight)
                                                      : exponential_slope(prediction, run.y[row], weight);
    run.drawn[j] = int32_t(row);
  }
}

// The numbers of one step of one run.
template <typename T>
struct StepNumbers {
  SteepestNumbers<T> steepest;
  AdamNumbers<T> adam;
  Power power;
  bool adaptive;
};

template <typename T>
PYSTEEP_INLINE void step_factor(T& factor, T gradient, T* moments, int64_t n, const StepNumbers<T>& numbers) {
  if (numbers.adaptive) return adam_step(factor, gradient, moments[0], moments[n], numbers.adam);
  T none = T(0);
  const T c = steepest_direction<false>(factor, gradient, none, numbers.steepest);
  steepest_step<false>(factor, gradient, none, signed_power(numbers.power, c, numbers.steepest.exponent), numbers.steepest);
}

template <bool WithData, typename T>
PYSTEEP_INLINE void coordinates_phase(const Flows& flows, int64_t index, int64_t step, int thread, StepNumbers<T> numbers,
                                      const Run<T>& run) {
  const Rows<WithData, T> data(flows, index, run);
  const int64_t n = flows.n, depth = flows.depth[index];
  const int count = static_cast<int>(flows.batch_size == 0 ? flows.k : flows.batch_size);
  if (numbers.adaptive) numbers.adam = adam_numbers<T>(flows, index, step);
  for (int64_t l = thread; l < n; l += threads_per_run) {
    const T* column = data.Z + l;
    const T gradient = flows.batch_size == 0
                           ? sum_of_products(run.slopes, count, [&](int j) { return column[j * data.stride]; })
                           : sum_of_products(run.slopes, count, [&](int j) { return column[run.drawn[j] * data.stride]; });
    if (depth > 1) {
      const T of_first = tied_gradient_of_first(gradient, run.rest[l], run.others[l]);
      const T of_rest = tied_gradient_of_rest(gradient, run.first[l], run.others[l]);
      step_factor(run.first[l], of_first, run.moments + l, n, numbers);
      step_factor(run.rest[l], of_rest, run.moments + 2 * n + l, n, numbers);
    } else {
      step_factor(run.first[l], gradient, run.moments + l, n, numbers);
    }
    fill_product(run, depth, l);
  }
}

// Every thread of the block; then they wait for each other.
struct AllThreads {
  template <typename Phase>
  PYSTEEP_INLINE void operator()(const Phase& phase) const {
#if defined(__CUDA_ARCH__)
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
#else
    for (int thread = 0; thread < threads_per_run; ++thread) phase(thread);
#endif
  }
};

template <bool WithData, typename T>
PYSTEEP_INLINE void take_steps(const Flows& flows, int64_t index, int64_t begin, int64_t end, const Run<T>& run) {
  const AllThreads all;
  const StepNumbers<T> numbers{
      steepest_numbers<T>(flow_options(flows, index)), {}, power_of(flows.q[index]), flows.moments != nullptr};
  all([&](int thread) { load_phase<WithData>(flows, index, thread, run); });
  for (int64_t step = begin; step < end; ++step) {
    all([&](int thread) { rows_phase<WithData>(flows, index, step, thread, run); });
    all([&](int thread) { coordinates_phase<WithData>(flows, index, step, thread, numbers, run); });
  }
  all([&](int thread) { store_phase(flows, index, thread, run); });
}

template <typename T>
__global__ void __launch_bounds__(threads_per_run, sizeof(T) == 4 ? 6 : 3)
    diagonal_flow_kernel(const __grid_constant__ Flows flows, int64_t begin, int64_t end, bool with_data) {
#if defined(__CUDA_ARCH__)
  extern __shared__ double2 memory[];  // for its alignment
  const Run<T> run(flows, memory, with_data);
  for (int64_t index = blockIdx.x; index < flows.runs; index += gridDim.x) {
    if (with_data)
      take_steps<true>(flows, index, begin, end, run);
    else
      take_steps<false>(flows, index, begin, end, run);
  }
#endif
}

template <typename T>
cudaError_t run_all(const Flows& flows, int64_t begin, int64_t end, const Where& where) {
  if (where.on_host) {
    // With the data copied for every other run.
    std::vector<double> memory(size_t(Run<T>::bytes(flows, true)) / sizeof(double) + 1);
    for (int64_t index = 0; index < flows.runs; ++index) {
      if (index % 2 == 0)
        take_steps<true>(flows, index, begin, end, Run<T>(flows, memory.data(), true));
      else
        take_steps<false>(flows, index, begin, end, Run<T>(flows, memory.data(), false));
    }
    return cudaSuccess;
  }
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device);
  const bool with_data = Run<T>::bytes(flows, true) <= most;
  const int64_t bytes = Run<T>::bytes(flows, with_data);
  if (bytes > most) return cudaErrorInvalidValue;
  const cudaError_t error =
      cudaFuncSetAttribute(diagonal_flow_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const int grid = static_cast<int>(std::min<int64_t>(flows.runs, 1 << 20));
  diagonal_flow_kernel<T><<<grid, threads_per_run, size_t(bytes), where.stream>>>(flows, begin, end, with_data);
  return cudaGetLastError();
}

cudaError_t run(const Flows& flows, int64_t begin, int64_t end, const Where& where) {
  if (flows.runs == 0) return cudaSuccess;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  return flows.dtype == PYSTEEP_FLOAT64 ? run_all<double>(flows, begin, end, where) : run_all<float>(flows, begin, end, where);
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_diagonal_flow_cuda(const pysteep_diagonal_flows* flows, int64_t begin, int64_t end, int device, void* stream) {
  return pysteep::cuda::run(*flows, begin, end, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_diagonal_flow_cuda_on_host(const pysteep_diagonal_flows* flows, int64_t begin, int64_t end) {
  return pysteep::cuda::run(*flows, begin, end, {true, 0, nullptr});
}

}  // extern "C"
