// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/diagonal_flow.h. A thread takes one run, or two,
// after another and stays with it to its last step: state and data are in its near caches by then.
#include "math/diagonal_flow.h"

#include <omp.h>

#include <cstdlib>

#include "cpu/factor_blocks.h"
#include "cpu/float_mode.h"
#include "cpu/steepest_blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Flows = pysteep_diagonal_flows;

constexpr int64_t line = 64;  // bytes; rows begin at lines and end with zeros

// What the instruction set has: of vectors wider than its registers GCC keeps the parts in memory.
#if defined(__AVX512F__)
constexpr int64_t register_bytes = 64, widest_tile = 8;
#elif defined(__AVX__)
constexpr int64_t register_bytes = 32, widest_tile = 6;
#else
constexpr int64_t register_bytes = 16, widest_tile = 6;
#endif

template <typename T>
using Vector __attribute__((vector_size(register_bytes))) = T;

template <typename T>
constexpr int64_t lanes = line / int64_t(sizeof(T));

template <typename T>
int64_t padded(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// What a thread keeps: the data of one problem, and the runs that it takes side by side. Rows and columns are padded by zeros,
// which stay zeros of every product.
constexpr int most_together = 2;  // runs on one problem: each number of its data is loaded once for both

template <typename T>
struct Run {
  T *x, *first, *rest, *others, *gradient, *of_first, *of_rest;  // n each; others = r^(L-2)
  T* slopes;                                                     // k
  T* moments[4];
};

template <typename T>
struct Memory {
  int64_t k, n, padded_k, padded_n;
  T *by_rows, *by_columns, *y;  // Z, its transpose, y
  int64_t problem = -1;         // whose data that is
  Run<T> runs[most_together];

  static int64_t numbers(const Flows& flows) {
    const int64_t k = padded<T>(flows.k), n = padded<T>(flows.n);
    return 2 * k * n + k + most_together * (k + 11 * n);
  }

  Memory(const Flows& flows, T* memory) : k(flows.k), n(flows.n), padded_k(padded<T>(k)), padded_n(padded<T>(n)) {
    const auto take = [&](int64_t count) {
      T* taken = memory;
      for (int64_t i = 0; i < count; ++i) taken[i] = T(0);
      memory += count;
      return taken;
    };
    by_rows = take(padded_k * padded_n);
    by_columns = take(padded_k * padded_n);
    y = take(padded_k);
    for (Run<T>& run : runs) {
      T** const vectors[] = {&run.x, &run.first, &run.rest, &run.others, &run.gradient, &run.of_first, &run.of_rest};
      for (T** vector : vectors) *vector = take(padded_n);
      for (T*& vector : run.moments) vector = take(padded_n);
      run.slopes = take(padded_k);
    }
  }

  void load(const Flows& flows, int64_t index, Run<T>& run) {
    if (problem != flows.problem[index]) pack(flows, flows.problem[index]);
    std::memcpy(run.first, static_cast<const T*>(flows.first) + index * n, size_t(n) * sizeof(T));
    std::memcpy(run.rest, static_cast<const T*>(flows.rest) + index * n, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < 4 && flows.moments != nullptr; ++i)
      std::memcpy(run.moments[i], static_cast<const T*>(flows.moments) + (i * flows.runs + index) * n, size_t(n) * sizeof(T));
  }

  void store(const Flows& flows, int64_t index, const Run<T>& run) const {
    std::memcpy(static_cast<T*>(flows.first) + index * n, run.first, size_t(n) * sizeof(T));
    std::memcpy(static_cast<T*>(flows.rest) + index * n, run.rest, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < 4 && flows.moments != nullptr; ++i)
      std::memcpy(static_cast<T*>(flows.moments) + (i * flows.runs + index) * n, run.moments[i], size_t(n) * sizeof(T));
  }

 private:
  void pack(const Flows& flows, int64_t index) {
    const T* Z = static_cast<const T*>(flows.Z) + index * k * n;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < n; ++l) by_columns[l * padded_k + i] = by_rows[i * padded_n + l] = Z[i * n + l];
    std::memcpy(y, static_cast<const T*>(flows.y) + index * k, size_t(k) * sizeof(T));
    problem = index;
  }
};

// ---- Sums of rows: result[c] = sum_i coefficients[c][i] row_i, for `Count` of them ----

// `Tile` vectors of each result at a time, which stay in registers.
template <int Tile, int Count, typename T>
PYSTEEP_INLINE void sums_of_tile(const T* rows, int64_t stride, const T* const (&coefficients)[Count], int64_t count,
                                 T* const (&results)[Count], int64_t at) {
  Vector<T> sums[Count][Tile] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T>* row = reinterpret_cast<const Vector<T>*>(rows + i * stride + at);
#pragma GCC unroll 8
    for (int c = 0; c < Count; ++c) {
      const Vector<T> coefficient = coefficients[c][i] - Vector<T>{};
#pragma GCC unroll 8
      for (int t = 0; t < Tile; ++t) sums[c][t] += row[t] * coefficient;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Count; ++c)
#pragma GCC unroll 8
    for (int t = 0; t < Tile; ++t) reinterpret_cast<Vector<T>*>(results[c] + at)[t] = sums[c][t];
}

template <int Count, typename T>
void sums_of_rows(const T* rows, int64_t stride, const T* const (&coefficients)[Count], int64_t count,
                  T* const (&results)[Count]) {
  int64_t at = 0;
  const auto tiles = [&]<int Tile>() {
    constexpr int64_t width = Tile * register_bytes / int64_t(sizeof(T));
    for (; at + width <= stride; at += width) sums_of_tile<Tile, Count>(rows, stride, coefficients, count, results, at);
  };
  if constexpr (widest_tile == 8) {
    tiles.template operator()<8>();
    tiles.template operator()<7>();
  }
  tiles.template operator()<6>();
  tiles.template operator()<5>();
  tiles.template operator()<4>();
  tiles.template operator()<3>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  T sums[lanes<T>] = {};
  for (int64_t at = 0; at < n; at += lanes<T>) {
#pragma omp simd
    for (int64_t i = 0; i < lanes<T>; ++i) sums[i] += a[at + i] * b[at + i];
  }
  T sum = T(0);
  for (int64_t i = 0; i < lanes<T>; ++i) sum += sums[i];
  return sum;
}

// ---- One step ----

template <typename T>
T slope_of(const Flows& flows, T prediction, T y, T weight) {
  return flows.loss == PYSTEEP_MEAN_SQUARE ? mean_square_slope(prediction, y, weight)
                                           : exponential_slope(prediction, y, weight);
}

template <typename T>
void fill_gradient_of_batch(const Flows& flows, int64_t index, int64_t step, const Memory<T>& memory, Run<T>& run) {
  const T weight = flows.mean ? T(1.0 / double(flows.batch_size)) : T(1);
  T* gradient = run.gradient;
  for (int64_t l = 0; l < memory.padded_n; ++l) gradient[l] = T(0);
  for (int64_t j = 0; j < flows.batch_size; ++j) {
    const int64_t row = drawn_row(flows.seed[index], step, j, memory.k);
    const T* z = memory.by_rows + row * memory.padded_n;
    const T slope = slope_of(flows, dot(z, run.x, memory.padded_n), memory.y[row], weight);
#pragma omp simd
    for (int64_t l = 0; l < memory.padded_n; ++l) gradient[l] += slope * z[l];
  }
}

template <typename T>
void fill_slopes(const Flows& flows, const T* __restrict y, int64_t k, T* __restrict slopes) {
  const T weight = flows.mean ? T(1.0 / double(flows.k)) : T(1);
  if (flows.loss == PYSTEEP_MEAN_SQUARE) {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) slopes[i] = mean_square_slope(slopes[i], y[i], weight);
  } else {
    for (int64_t i = 0; i < k; ++i) slopes[i] = exponential_slope(slopes[i], y[i], weight);
  }
}

template <int Count, typename T>
void fill_gradients(const Flows& flows, const Memory<T>& memory, Run<T>* runs) {
  const T *x[Count], *slopes[Count];
  T *predictions[Count], *gradients[Count];
  for (int c = 0; c < Count; ++c) {
    x[c] = runs[c].x;
    slopes[c] = predictions[c] = runs[c].slopes;
    gradients[c] = runs[c].gradient;
  }
  sums_of_rows<Count>(memory.by_columns, memory.padded_k, x, memory.n, predictions);
  for (int c = 0; c < Count; ++c) fill_slopes(flows, memory.y, memory.k, predictions[c]);
  sums_of_rows<Count>(memory.by_rows, memory.padded_n, slopes, memory.k, gradients);
}

template <Power P, typename T>
void step_factor(T* factor, const T* gradient, int64_t n, const SteepestNumbers<T>& numbers) {
  for (int64_t at = 0; at < n; at += block_elements) {
    const int64_t length = n - at < block_elements ? n - at : block_elements;
    step_along<P, false, 64>(
        Operands<T>{factor + at, nullptr, nullptr, length}, numbers, [&](int64_t i) { return gradient[at + i]; },
        [](int64_t, T, T) {});
  }
}

template <typename T>
void step_factor(T* __restrict factor, const T* __restrict gradient, T* __restrict first_moment, T* __restrict second_moment,
                 int64_t n, const AdamNumbers<T> numbers) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) adam_step(factor[i], gradient[i], first_moment[i], second_moment[i], numbers);
}

template <typename T>
void fill_product(int64_t depth, int64_t n, Run<T>& run) {
  if (depth == 1) return copy(run.first, n, run.x);
  integer_powers(run.rest, depth - 2, n, run.others);
  tied_products(run.first, run.rest, run.others, n, run.x);
}

template <typename T>
void step_factors(const Flows& flows, int64_t index, int64_t step, const SteepestNumbers<T>& numbers, int64_t n, Run<T>& run) {
  const int64_t factors = flows.depth[index] > 1 ? 2 : 1;
  if (factors == 2)
    tied_gradients(run.gradient, T(1), run.first, run.rest, run.others, n, run.of_first, run.of_rest);
  else
    copy(run.gradient, n, run.of_first);
  T* const stored[] = {run.first, run.rest};
  const T* const gradients[] = {run.of_first, run.of_rest};
  if (flows.moments != nullptr) {
    const AdamNumbers<T> adam = adam_numbers<T>(flows, index, step);
    for (int64_t i = 0; i < factors; ++i)
      step_factor(stored[i], gradients[i], run.moments[2 * i], run.moments[2 * i + 1], n, adam);
  } else {
    specialise_power(flows.q[index], [&]<Power P>() {
      for (int64_t i = 0; i < factors; ++i) step_factor<P>(stored[i], gradients[i], n, numbers);
    });
  }
}

template <int Count, typename T>
void take_steps(const Flows& flows, int64_t index, int64_t begin, int64_t end, Memory<T>& memory) {
  SteepestNumbers<T> numbers[Count];
  const int64_t n = memory.padded_n;
  for (int c = 0; c < Count; ++c) {
    memory.load(flows, index + c, memory.runs[c]);
    numbers[c] = steepest_numbers<T>(flow_options(flows, index + c));
  }
  for (int64_t step = begin; step < end; ++step) {
    for (int c = 0; c < Count; ++c) fill_product(flows.depth[index + c], n, memory.runs[c]);
    if (flows.batch_size == 0)
      fill_gradients<Count>(flows, memory, memory.runs);
    else
      for (int c = 0; c < Count; ++c) fill_gradient_of_batch(flows, index + c, step, memory, memory.runs[c]);
    for (int c = 0; c < Count; ++c) step_factors(flows, index + c, step, numbers[c], n, memory.runs[c]);
  }
  for (int c = 0; c < Count; ++c) memory.store(flows, index + c, memory.runs[c]);
}

template <typename T>
bool flow(const Flows& flows, int64_t begin, int64_t end) {
  // Fewer runs than that are shared out better one by one.
  const int64_t together = flows.runs >= 4 * omp_get_max_threads() ? most_together : 1;
  int64_t next = 0;
  const FloatMode callers = float_mode();
#pragma omp parallel if (flows.runs > 1)
  {
    const InFloatMode mode(callers);
    void* allocated = std::aligned_alloc(line, size_t(Memory<T>::numbers(flows)) * sizeof(T));
    if (allocated != nullptr) {
      Memory<T> memory(flows, static_cast<T*>(allocated));
      for (;;) {
        int64_t index;
#pragma omp atomic capture
        {
          index = next;
          next += together;
        }
        if (index >= flows.runs) break;
        const bool pair = together == 2 && index + 1 < flows.runs && flows.problem[index] == flows.problem[index + 1];
        if (pair) {
          take_steps<2>(flows, index, begin, end, memory);
        } else {
          for (int64_t i = index; i < index + together && i < flows.runs; ++i) take_steps<1>(flows, i, begin, end, memory);
        }
      }
      std::free(allocated);
    }
  }
  return next >= flows.runs;  // else no thread had memory
}

}  // namespace

int diagonal_flow_cpu(const Flows& flows, int64_t begin, int64_t end) {
  const bool done = flows.dtype == PYSTEEP_FLOAT64 ? flow<double>(flows, begin, end) : flow<float>(flows, begin, end);
  return done ? 0 : 1;
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
