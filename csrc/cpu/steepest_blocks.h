// The steepest step on a block of elements in the compute type: what steepest_step and factor_step have in common.
#pragma once

#include "cpu/blocks.h"
#include "math/steepest_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// The arguments of a block of elements; momentum is null without one.
template <typename T>
struct Operands {
  T* __restrict weight;
  const T* __restrict gradient;
  T* __restrict momentum;
  int64_t n;
};

// c, the vector that a step follows: the gradient itself, or `buffer`.
template <bool HasMomentum, typename T>
const T* directions(const Operands<T> block, const SteepestNumbers<T> numbers, T* __restrict buffer) {
  if (!HasMomentum && numbers.coupled == T(0) && numbers.gradient_factor == T(1)) return block.gradient;
#pragma omp simd
  for (int64_t i = 0; i < block.n; ++i)
    buffer[i] =
        steepest_direction<HasMomentum>(block.weight[i], block.gradient[i], HasMomentum ? block.momentum[i] : T(0), numbers);
  return buffer;
}

// log2|c| of a block at general q. A loop of their own: in one loop with the exponential, the chain of dependent operations is
// so long that a core's window holds fewer than two iterations of it.
template <typename T>
struct Logarithms {
  bool normal;  // whether every c lies in Range::normal
  alignas(64) T whole[block_elements], fraction[block_elements];

  Logarithms(const T* c, int64_t n) {
    normal = fill<Range::normal>(c, n);
    if (!normal) fill<Range::any>(c, n);
  }

  PYSTEEP_INLINE Logarithm<T> operator[](int64_t i) const { return {whole[i], fraction[i]}; }

 private:
  template <Range R>
  bool fill(const T* __restrict c, int64_t n) {
    auto largest = Extent<T>().largest, smallest = Extent<T>().smallest;
#pragma omp simd reduction(max : largest) reduction(min : smallest)
    for (int64_t i = 0; i < n; ++i) {
      const Logarithm<T> log = logarithm<Power::general, R>(c[i]);
      whole[i] = log.whole;
      fraction[i] = log.fraction;
      const auto size = Extent<T>::size(c[i]);
      largest = size > largest ? size : largest;
      smallest = size - 1 < smallest ? size - 1 : smallest;
    }
    return Extent<T>{largest, smallest}.is_normal();
  }
};

template <Range R, bool HasMomentum, typename T, typename After>
void step_general(const Operands<T> block, const T* c, const Logarithms<T>& logs, const SteepestNumbers<T> numbers,
                  const After after) {
#pragma omp simd
  for (int64_t i = 0; i < block.n; ++i) {
    T w = block.weight[i], m = HasMomentum ? block.momentum[i] : T(0);
    const T old = w, u = signed_power<Power::general, R>(c[i], logs[i], numbers.exponent);
    steepest_step<HasMomentum>(w, block.gradient[i], m, u, numbers);
    block.weight[i] = w;
    if (HasMomentum) block.momentum[i] = m;
    after(i, old, w);
  }
}

// Steps along the gradients gradient_at(i) and calls after(i, old weight, new weight) for each; block.gradient is not used.
// Width: bytes of the vectors that a loop without logarithms works in.
template <Power P, bool HasMomentum, int Width, typename T, typename Gradient, typename After>
void step_along(Operands<T> block, const SteepestNumbers<T> numbers, const Gradient gradient_at, const After after) {
  if constexpr (P == Power::general) {
    alignas(64) T gradient[block_elements], buffer[block_elements];
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) gradient[i] = gradient_at(i);
    block.gradient = gradient;
    const T* c = directions<HasMomentum>(block, numbers, buffer);
    const Logarithms<T> logs(c, block.n);
    logs.normal ? step_general<Range::normal, HasMomentum>(block, c, logs, numbers, after)
                : step_general<Range::any, HasMomentum>(block, c, logs, numbers, after);
  } else {
#pragma omp simd simdlen(Width / sizeof(T))
    for (int64_t i = 0; i < block.n; ++i) {
      T w = block.weight[i], m = HasMomentum ? block.momentum[i] : T(0);
      const T old = w, g = gradient_at(i);
      const T c = steepest_direction<HasMomentum>(w, g, m, numbers);
      steepest_step<HasMomentum>(w, g, m, signed_power<P>(c, {}, numbers.exponent), numbers);
      block.weight[i] = w;
      if (HasMomentum) block.momentum[i] = m;
      after(i, old, w);
    }
  }
}

// Calls run.template operator()<P>() with the power that q asks for.
template <typename Run>
void specialise_power(double q, const Run& run) {
  switch (power_of(q)) {
    case Power::sign:
      return run.template operator()<Power::sign>();
    case Power::root:
      return run.template operator()<Power::root>();
    case Power::identity:
      return run.template operator()<Power::identity>();
    case Power::general:
      return run.template operator()<Power::general>();
  }
}

// Calls run.template operator()<P, HasMomentum, T>() with the constants and the compute type that the call asks for.
template <typename Run>
void specialise(double q, bool momentum, pysteep_dtype weight, const Run& run) {
  specialise_power(q, [&]<Power P>() {
    if (weight == PYSTEEP_FLOAT64)
      momentum ? run.template operator()<P, true, double>() : run.template operator()<P, false, double>();
    else
      momentum ? run.template operator()<P, true, float>() : run.template operator()<P, false, float>();
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
