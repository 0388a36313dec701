// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/diagonal_flow.h. A thread takes one run after
// another and stays with it to its last step: state and data are in its near caches by then.
#include "math/diagonal_flow.h"

#include <cstdlib>

#include "cpu/factor_blocks.h"
#include "cpu/steepest_blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Flows = pysteep_diagonal_flows;

constexpr int64_t line = 64;  // bytes; rows begin at lines and end with zeros

template <typename T>
using Vector __attribute__((vector_size(line))) = T;

template <typename T>
constexpr int64_t lanes = line / int64_t(sizeof(T));

template <typename T>
int64_t padded(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// What a thread keeps of one run. Columns and rows are padded by zeros, which stay zeros of every product.
template <typename T>
struct Run {
  int64_t k, n, padded_k, padded_n;
  T *by_rows, *by_columns, *y;              // Z and its transpose
  T *x, *first, *rest, *others, *gradient;  // n each; others = r^(L-2)
  T *of_first, *of_rest, *slopes;           // the last of k
  T* moments[4];
  int64_t packed_problem;

  static int64_t numbers(const Flows& flows) {
    const int64_t k = padded<T>(flows.k), n = padded<T>(flows.n);
    return k * n * 2 + 2 * k + 11 * n;
  }

  Run(const Flows& flows, T* memory) : k(flows.k), n(flows.n), padded_k(padded<T>(k)), padded_n(padded<T>(n)) {
    const auto take = [&](int64_t count) {
      T* taken = memory;
      for (int64_t i = 0; i < count; ++i) taken[i] = T(0);
      memory += count;
      return taken;
    };
    by_rows = take(padded_k * padded_n);
    by_columns = take(padded_k * padded_n);
    y = take(padded_k);
    slopes = take(padded_k);
    T** const vectors[] = {&x, &first, &rest, &others, &gradient, &of_first, &of_rest};
    for (T** vector : vectors) *vector = take(padded_n);
    for (T*& vector : moments) vector = take(padded_n);
    packed_problem = -1;
  }

  void load(const Flows& flows, int64_t run) {
    if (packed_problem != flows.problem[run]) pack(flows, flows.problem[run]);
    std::memcpy(first, static_cast<const T*>(flows.first) + run * n, size_t(n) * sizeof(T));
    std::memcpy(rest, static_cast<const T*>(flows.rest) + run * n, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < 4 && flows.moments != nullptr; ++i)
      std::memcpy(moments[i], static_cast<const T*>(flows.moments) + (i * flows.runs + run) * n, size_t(n) * sizeof(T));
  }

  void store(const Flows& flows, int64_t run) const {
    std::memcpy(static_cast<T*>(flows.first) + run * n, first, size_t(n) * sizeof(T));
    std::memcpy(static_cast<T*>(flows.rest) + run * n, rest, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < 4 && flows.moments != nullptr; ++i)
      std::memcpy(static_cast<T*>(flows.moments) + (i * flows.runs + run) * n, moments[i], size_t(n) * sizeof(T));
  }

 private:
  void pack(const Flows& flows, int64_t problem) {
    const T* Z = static_cast<const T*>(flows.Z) + problem * k * n;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < n; ++l) by_columns[l * padded_k + i] = by_rows[i * padded_n + l] = Z[i * n + l];
    std::memcpy(y, static_cast<const T*>(flows.y) + problem * k, size_t(k) * sizeof(T));
    packed_problem = problem;
  }
};

// ---- Sums of rows: result = sum_i coefficient_i row_i ----

// `Tile` vectors of the result at a time, which stay in registers.
template <int Tile, typename T>
PYSTEEP_INLINE void sum_of_tile(const T* rows, int64_t stride, const T* coefficients, int64_t count, T* result) {
  Vector<T> sums[Tile] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T>* row = reinterpret_cast<const Vector<T>*>(rows + i * stride);
    const Vector<T> coefficient = coefficients[i] - Vector<T>{};
#pragma GCC unroll 8
    for (int t = 0; t < Tile; ++t) sums[t] += row[t] * coefficient;
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tile; ++t) reinterpret_cast<Vector<T>*>(result)[t] = sums[t];
}

template <typename T>
void sum_of_rows(const T* rows, int64_t stride, const T* coefficients, int64_t count, T* result) {
  int64_t at = 0;
  const auto tile = [&]<int Tile>() {
    for (; at + Tile * lanes<T> <= stride; at += Tile * lanes<T>)
      sum_of_tile<Tile>(rows + at, stride, coefficients, count, result + at);
  };
  tile.template operator()<8>();
  tile.template operator()<7>();
  tile.template operator()<6>();
  tile.template operator()<5>();
  tile.template operator()<4>();
  tile.template operator()<3>();
  tile.template operator()<2>();
  tile.template operator()<1>();
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
void fill_gradient(const Flows& flows, int64_t index, int64_t step, Run<T>& run) {
  const int64_t rows = flows.batch_size == 0 ? run.k : flows.batch_size;
  const T weight = flows.mean ? T(1.0 / double(rows)) : T(1);
  if (flows.batch_size != 0) {
    for (int64_t l = 0; l < run.padded_n; ++l) run.gradient[l] = T(0);
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t row = drawn_row(flows.seed[index], step, j, run.k);
      const T* z = run.by_rows + row * run.padded_n;
      const T slope = slope_of(flows, dot(z, run.x, run.padded_n), run.y[row], weight);
      T* gradient = run.gradient;
#pragma omp simd
      for (int64_t l = 0; l < run.padded_n; ++l) gradient[l] += slope * z[l];
    }
    return;
  }
  sum_of_rows(run.by_columns, run.padded_k, run.x, run.n, run.slopes);
  if (flows.loss == PYSTEEP_MEAN_SQUARE) {
    T* slopes = run.slopes;
    const T* y = run.y;
#pragma omp simd
    for (int64_t i = 0; i < run.padded_k; ++i) slopes[i] = mean_square_slope(slopes[i], y[i], weight);
  } else {
    for (int64_t i = 0; i < run.k; ++i) run.slopes[i] = exponential_slope(run.slopes[i], run.y[i], weight);
  }
  sum_of_rows(run.by_rows, run.padded_n, run.slopes, run.k, run.gradient);
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

template <Power P, typename T>
void take_steps(const Flows& flows, int64_t index, int64_t begin, int64_t end, Run<T>& run) {
  const pysteep_steepest_options options{flows.q[index],
                                         0,
                                         0,
                                         flows.weight_decay[index],
                                         flows.coupled_weight_decay[index],
                                         0,
                                         {flows.lr[index], nullptr, PYSTEEP_FLOAT64},
                                         {1, nullptr, PYSTEEP_FLOAT64},
                                         {1, nullptr, PYSTEEP_FLOAT64},
                                         {0, nullptr, PYSTEEP_FLOAT64}};
  const SteepestNumbers<T> numbers = steepest_numbers<T>(options);
  const int64_t depth = flows.depth[index], n = run.padded_n;
  for (int64_t step = begin; step < end; ++step) {
    if (depth > 1) {
      integer_powers(run.rest, depth - 2, n, run.others);
      tied_products(run.first, run.rest, run.others, n, run.x);
    } else {
      copy(run.first, n, run.x);
    }
    fill_gradient(flows, index, step, run);
    if (depth > 1) tied_gradients(run.gradient, T(1), run.first, run.rest, run.others, n, run.of_first, run.of_rest);
    const T* of_first = depth > 1 ? run.of_first : run.gradient;
    if (flows.moments != nullptr) {
      const AdamNumbers<T> adam = adam_numbers<T>(flows, index, step);
      step_factor(run.first, of_first, run.moments[0], run.moments[1], n, adam);
      if (depth > 1) step_factor(run.rest, run.of_rest, run.moments[2], run.moments[3], n, adam);
    } else {
      step_factor<P>(run.first, of_first, n, numbers);
      if (depth > 1) step_factor<P>(run.rest, run.of_rest, n, numbers);
    }
  }
}

template <typename T>
bool flow(const Flows& flows, int64_t begin, int64_t end) {
  int64_t next = 0;
#pragma omp parallel if (flows.runs > 1)
  {
    void* memory = std::aligned_alloc(line, size_t(Run<T>::numbers(flows)) * sizeof(T));
    if (memory != nullptr) {
      Run<T> run(flows, static_cast<T*>(memory));
      for (;;) {
        int64_t index;
#pragma omp atomic capture
        index = next++;
        if (index >= flows.runs) break;
        run.load(flows, index);
        specialise_power(flows.q[index], [&]<Power P>() { take_steps<P>(flows, index, begin, end, run); });
        run.store(flows, index);
      }
      std::free(memory);
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
