// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/mirror_step.h.
#include "math/mirror_step.h"

#include "cpu/factor_blocks.h"
#include "cpu/parallel.h"
#include "cpu/steepest_blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Tensors = pysteep_mirror_tensors;

// u(c) for each c; `u` may be `c`.
template <Power P, typename T>
void signed_powers(const T* c, int64_t n, const PowerExponent<T> exponent, T* u) {
  if constexpr (P == Power::general) {
    const Logarithms<T> logs(c, n);
    if (logs.normal) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P, Range::normal>(c[i], logs[i], exponent);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P, Range::any>(c[i], logs[i], exponent);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P>(c[i], {}, exponent);
  }
}

// root -> y, by the iteration.
template <typename T>
void solve(const T* __restrict root, int64_t n, int64_t depth, const MirrorNumbers<T> numbers, T* __restrict y) {
  alignas(64) T low[block_elements], size[block_elements], size_power[block_elements], power[block_elements];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T unit = root[i] > numbers.balance ? root[i] : numbers.balance;
    low[i] = numbers.balance / unit;
    size[i] = root[i] / unit;
  }
  integer_powers(size, depth, n, size_power);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = mirror_guess(low[i], size_power[i], numbers);
  bool all_close = false;
  for (int iteration = 0; iteration < mirror_iterations && !all_close; ++iteration) {
    integer_powers(y, depth - 1, n, power);
    T farthest = 0;
#pragma omp simd reduction(max : farthest)
    for (int64_t i = 0; i < n; ++i) {
      const T next = mirror_halley(y[i], power[i], low[i], size_power[i], numbers);
      const T change = magnitude(next - y[i]);
      farthest = change > farthest ? change : farthest;
      y[i] = next;
    }
    all_close = farthest <= numbers.close;
  }
  if (!all_close)
    for (int64_t i = 0; i < n; ++i) y[i] = mirror_safeguarded(y[i], low[i], size_power[i], depth, numbers);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] * (root[i] > numbers.balance ? root[i] : numbers.balance);
}

// w_2 = ... = w_L.
template <Power P, typename T>
void find_rest(const T* __restrict x, int64_t n, int64_t depth, const MirrorNumbers<T> numbers, T* __restrict rest) {
  alignas(64) T root[block_elements];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) root[i] = magnitude(x[i]);
  if (numbers.balance == T(0)) {
    if (depth == 2)
      signed_powers<Power::root>(root, n, numbers.inverse_depth, rest);
    else
      signed_powers<Power::general>(root, n, numbers.inverse_depth, rest);
    return;
  }
  if (depth == 2 && P == Power::sign) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rest[i] = mirror_depth_two_sign(root[i], numbers.balance);
  } else {
    if (depth != 2 || P != Power::identity) signed_powers<Power::general>(root, n, numbers.root, root);
    if (depth == 2) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rest[i] = mirror_depth_two(root[i], numbers.balance);
    } else {
      solve(root, n, depth, numbers, rest);
    }
  }
  if (P == Power::identity) signed_powers<Power::root>(rest, n, numbers.inverse_q, rest);
  if (P == Power::root || P == Power::general) signed_powers<Power::general>(rest, n, numbers.inverse_q, rest);
}

template <typename T>
void power_differences(const T* __restrict rest, const T* __restrict move, int64_t exponent, int64_t n, T* __restrict power,
                       T* __restrict difference) {
  copy(rest, n, power);
  copy(move, n, difference);
  for (int bit = highest_bit(exponent) - 1; bit >= 0; --bit) {
    const bool times_rest = (exponent >> bit & 1) != 0;
    const auto pass = [&](bool times) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const PowerDifference<T> next = squared_times(PowerDifference<T>{power[i], difference[i]}, rest[i], move[i], times);
        power[i] = next.power;
        difference[i] = next.difference;
      }
    };
    times_rest ? pass(true) : pass(false);
  }
}

template <Power P, typename T>
void step_mirror(T* __restrict x, const T* __restrict gradient, int64_t n, int64_t depth, const MirrorNumbers<T> numbers) {
  alignas(64) T rest[block_elements], others[block_elements], first[block_elements];
  alignas(64) T of_first[block_elements], of_rest[block_elements], power[block_elements], difference[block_elements];
  find_rest<P>(x, n, depth, numbers, rest);
  integer_powers(rest, depth - 2, n, others);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) first[i] = mirror_first(x[i], rest[i], others[i]);
  tied_gradients(gradient, numbers.gradient_factor, first, rest, others, n, of_first, of_rest);
  signed_powers<P>(of_first, n, numbers.direction, of_first);
  signed_powers<P>(of_rest, n, numbers.direction, of_rest);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    of_first[i] = mirror_move(first[i], of_first[i], numbers);
    of_rest[i] = mirror_move(rest[i], of_rest[i], numbers);
  }
  power_differences(rest, of_rest, depth - 1, n, power, difference);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    x[i] = mirror_product(x[i], first[i], of_first[i], PowerDifference<T>{power[i], difference[i]});
}

template <Power P, typename T>
void step_depth_two(T* __restrict x, const T* __restrict gradient, int64_t n, const MirrorNumbers<T> numbers) {
  if constexpr (P == Power::general) {
    alignas(64) T of_x[block_elements], of_gradient[block_elements];
    scale(gradient, numbers.gradient_factor, n, of_gradient);
    signed_powers<P>(of_gradient, n, numbers.direction, of_gradient);
    signed_powers<P>(x, n, numbers.direction, of_x);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = mirror_step_two(P, x[i], of_x[i], of_gradient[i], numbers);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T u = signed_power<P>(gradient[i] * numbers.gradient_factor, {}, numbers.direction);
      x[i] = mirror_step_two(P, x[i], signed_power<P>(x[i], {}, numbers.direction), u, numbers);
    }
  }
}

template <Power P, typename T>
void step_all(const Tensors& tensors, const MirrorNumbers<T>& shared) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    MirrorNumbers<T> numbers = shared;
    numbers.balance = T(*tensors.balance[tensor]);
    for (int64_t at = begin; at < end; at += block_elements) {
      const int64_t n = at + block_elements < end ? block_elements : end - at;
      Block<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n);
      Block<T> gradient(tensors.gradient[tensor], tensors.gradient_dtype, at, n);
      tensors.depth == 2 ? step_depth_two<P>(weight.data(), gradient.data(), n, numbers)
                         : step_mirror<P>(weight.data(), gradient.data(), n, tensors.depth, numbers);
      weight.write_back();
    }
  });
}

}  // namespace

void mirror_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options) {
  if (read(options.found_inf) != 0) return;
  const double at_one = mirror_at_one(tensors.depth);
  specialise_power(options.q, [&]<Power P>() {
    if (tensors.weight_dtype == PYSTEEP_FLOAT64)
      step_all<P>(tensors, mirror_numbers<double>(options, tensors.depth, at_one));
    else
      step_all<P>(tensors, mirror_numbers<float>(options, tensors.depth, at_one));
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
