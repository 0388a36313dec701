// The arithmetic of factor_step beyond that of its parts. Formula and order of rounding: include/pysteep/factor_step.h.
#pragma once

#include "math/factor_product.h"
#include "math/steepest_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// The step of each factor sees a gradient that is scaled already.
template <typename T>
struct FactorNumbers {
  T gradient_factor;
  SteepestNumbers<T> each;
};

template <typename T>
PYSTEEP_INLINE FactorNumbers<T> factor_numbers(const pysteep_steepest_options& options) {
  FactorNumbers<T> numbers{T(1), steepest_numbers<T>(options)};
  numbers.gradient_factor = numbers.each.gradient_factor;
  numbers.each.gradient_factor = T(1);
  return numbers;
}

// x^n takes the bits of n below the highest one from the top down: a square for each, times x where the bit is 1.
PYSTEEP_INLINE int highest_bit(int64_t n) {
#if defined(__CUDA_ARCH__)
  return 63 - __clzll(n | 1);
#else
  int bit = 0;
  while (n >> (bit + 1) != 0) ++bit;
  return bit;
#endif
}

template <typename T>
PYSTEEP_INLINE T squared_times(T power, T x, bool times_x) {
  return times_x ? power * power * x : power * power;
}

template <typename T>
PYSTEEP_INLINE T integer_power(T x, int64_t n) {
  if (n == 0) return T(1);
  T power = x;
  for (int bit = highest_bit(n) - 1; bit >= 0; --bit) power = squared_times(power, x, (n >> bit & 1) != 0);
  return power;
}

// The same without a loop, for vectors. `Bits` is highest_bit(n).
template <int Bits, typename T>
PYSTEEP_INLINE T integer_power(T x, int64_t n) {
  if constexpr (Bits == 0) {
    return n == 0 ? T(1) : x;
  } else {
    const T power = integer_power<Bits - 1>(x, n >> 1);
    return power * power * ((n & 1) != 0 ? x : T(1));
  }
}

// Tied: w_2 = ... = w_L = rest, and others = rest^(L-2).
template <typename T>
PYSTEEP_INLINE T tied_gradient_of_first(T gradient, T rest, T others) {
  return gradient * (others * rest);
}

template <typename T>
PYSTEEP_INLINE T tied_gradient_of_rest(T gradient, T first, T others) {
  return gradient * (first * others);
}

template <typename T>
PYSTEEP_INLINE T tied_product(T first, T rest, T others) {
  return first * (others * rest);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
