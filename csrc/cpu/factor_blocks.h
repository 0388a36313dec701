// Loops over blocks of factors that the depth ops have in common.
#pragma once

#include "cpu/blocks.h"
#include "math/factor_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// Of each tensor before the turn of the next: from longer stretches of several tensors a core prefetches half as fast.
constexpr int64_t stretch_bytes = 512;

// Products from the back, one for each factor, stay in a near cache: with many factors blocks are smaller.
constexpr int64_t tail_elements = 8192;

inline int64_t block_size(int64_t factors, pysteep_dtype dtype) {
  const int64_t stretch = stretch_bytes / bytes_of(dtype), fitting = tail_elements / factors / 64 * 64;
  return fitting < stretch ? fitting : stretch;
}

template <typename T>
void copy(const T* __restrict from, int64_t n, T* __restrict to) {
  std::memcpy(to, from, size_t(n) * sizeof(T));
}

template <typename T>
void multiply(const T* a, const T* b, int64_t n, T* product) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) product[i] = a[i] * b[i];
}

template <typename T>
void scale(const T* __restrict from, T factor, int64_t n, T* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}

// The gradient of a factor, and the head of the next one.
template <typename T>
void gradient_and_head(const T* __restrict tail, const T* __restrict factor, int64_t n, T* __restrict head,
                       T* __restrict gradient) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gradient[i] = factor_gradient(head[i], tail[i]);
    head[i] = head[i] * factor[i];
  }
}

template <typename T>
void integer_powers(const T* __restrict x, int64_t exponent, int64_t n, T* __restrict power) {
  if (exponent == 0) {
    for (int64_t i = 0; i < n; ++i) power[i] = T(1);
    return;
  }
  copy(x, n, power);
  for (int bit = highest_bit(exponent) - 1; bit >= 0; --bit) {
    if ((exponent >> bit & 1) != 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) power[i] = squared_times(power[i], x[i], true);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) power[i] = squared_times(power[i], x[i], false);
    }
  }
}

template <typename T>
void tied_gradients(const T* __restrict gradient, T gradient_factor, const T* __restrict first, const T* __restrict rest,
                    const T* __restrict others, int64_t n, T* __restrict of_first, T* __restrict of_rest) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = gradient[i] * gradient_factor;
    of_first[i] = tied_gradient_of_first(g, rest[i], others[i]);
    of_rest[i] = tied_gradient_of_rest(g, first[i], others[i]);
  }
}

template <typename T>
void tied_products(const T* __restrict first, const T* __restrict rest, const T* __restrict others, int64_t n,
                   T* __restrict product) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) product[i] = tied_product(first[i], rest[i], others[i]);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
