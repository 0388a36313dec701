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

// One pass of the iteration; returns whether every y was close to its solution before it.
template <int Bits, typename T>
bool iterate(const T* __restrict power_of_x, int64_t n, int64_t depth, const MirrorNumbers<T> numbers, T* __restrict y) {
  T largest = T(0), marked = T(0);
#pragma omp simd reduction(max : largest) reduction(+ : marked)
  for (int64_t i = 0; i < n; ++i) {
    const T next = mirror_iterate(y[i], integer_power<Bits>(y[i], depth - 1), power_of_x[i], numbers);
    const T excess = magnitude(next - y[i]) - numbers.close * next;
    largest = excess > largest ? excess : largest;
    marked += excess * T(0);  // NaN once there was one, which is no larger than anything
    y[i] = next;
  }
  return largest == T(0) && marked == T(0);
}

template <int Bits, typename T>
void move_all(const T* __restrict y, const T* __restrict of_x, const T* __restrict of_gradient, int64_t n, int64_t depth,
              const MirrorNumbers<T> numbers, T* __restrict x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T power = integer_power<Bits>(y[i], depth - 1);
    const T growth = relative_power<Bits>(mirror_relative_move(of_x[i], of_gradient[i], y[i], numbers), depth - 1);
    x[i] = mirror_moved(x[i], of_gradient[i], power, growth, numbers);
  }
}

template <Power P, int Bits, typename T>
void step_deep(T* __restrict x, const T* __restrict gradient, int64_t n, int64_t depth, const MirrorNumbers<T> numbers,
               const MirrorHill<T> hill) {
  if constexpr (Bits <= 5) {
    if (highest_bit(depth - 1) != Bits) return step_deep<P, Bits + 1>(x, gradient, n, depth, numbers, hill);
    alignas(64) T of_x[block_elements], of_gradient[block_elements], power_of_x[block_elements], y[block_elements];
    scale(gradient, numbers.gradient_factor, n, of_gradient);
    signed_powers<P>(of_gradient, n, numbers.direction, of_gradient);
    signed_powers<P>(x, n, numbers.direction, of_x);
    if (numbers.balance == T(0)) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = magnitude(x[i]);
      signed_powers<Power::general>(y, n, numbers.root, y);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        power_of_x[i] = magnitude(x[i] * of_x[i]);
        y[i] = mirror_first_guess(magnitude(x[i]), hill);
      }
      bool close = false;
      for (int iteration = 0; iteration < mirror_iterations && !close; ++iteration)
        close = iterate<Bits>(power_of_x, n, depth, numbers, y);
      if (!close)
        for (int64_t i = 0; i < n; ++i)
          y[i] = mirror_solution(signed_power(Power::general, magnitude(x[i]), numbers.root), depth, numbers);
    }
    move_all<Bits>(y, of_x, of_gradient, n, depth, numbers, x);
  }
}

template <Power P, typename T>
void step_all(const Tensors& tensors, double q, const MirrorNumbers<T>& shared) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    MirrorNumbers<T> numbers = shared;
    numbers.balance = T(*tensors.balance[tensor]);
    const MirrorHill<T> hill = mirror_hill(q, tensors.depth, double(numbers.at_one), numbers.balance);
    for (int64_t at = begin; at < end; at += block_elements) {
      const int64_t n = at + block_elements < end ? block_elements : end - at;
      if (tensors.depth > 2) {  // long enough on a block for the next one to arrive
        prefetch_block(tensors.weight[tensor], tensors.weight_dtype, at + n, n);
        prefetch_block(tensors.gradient[tensor], tensors.gradient_dtype, at + n, n);
      }
      Block<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n);
      Block<T> gradient(tensors.gradient[tensor], tensors.gradient_dtype, at, n);
      tensors.depth == 2 ? step_depth_two<P>(weight.data(), gradient.data(), n, numbers)
                         : step_deep<P, 1>(weight.data(), gradient.data(), n, tensors.depth, numbers, hill);
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
      step_all<P>(tensors, options.q, mirror_numbers<double>(options, tensors.depth, at_one));
    else
      step_all<P>(tensors, options.q, mirror_numbers<float>(options, tensors.depth, at_one));
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
