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

template <Range R, bool HasMomentum, typename T>
void step_general(const Operands<T> block, const T* c, const Logarithms<T>& logs, const SteepestNumbers<T> numbers) {
#pragma omp simd
  for (int64_t i = 0; i < block.n; ++i) {
    T m = HasMomentum ? block.momentum[i] : T(0);
    const T u = signed_power<Power::general, R>(c[i], logs[i], numbers.exponent);
    steepest_step<HasMomentum>(block.weight[i], block.gradient[i], m, u, numbers);
    if (HasMomentum) block.momentum[i] = m;
  }
}

template <Power P, bool HasMomentum, typename T>
void step_block(const Operands<T> block, const SteepestNumbers<T> numbers) {
  if constexpr (P == Power::general) {
    alignas(64) T buffer[block_elements];
    const T* c = directions<HasMomentum>(block, numbers, buffer);
    const Logarithms<T> logs(c, block.n);
    logs.normal ? step_general<Range::normal, HasMomentum>(block, c, logs, numbers)
                : step_general<Range::any, HasMomentum>(block, c, logs, numbers);
  } else {
    // 32-byte vectors: with wider ones so short a loop runs so far ahead that memory serves it a tenth slower.
#pragma omp simd simdlen(32 / sizeof(T))
    for (int64_t i = 0; i < block.n; ++i) {
      T m = HasMomentum ? block.momentum[i] : T(0);
      const T c = steepest_direction<HasMomentum>(block.weight[i], block.gradient[i], m, numbers);
      steepest_step<HasMomentum>(block.weight[i], block.gradient[i], m, signed_power<P>(c, {}, numbers.exponent), numbers);
      if (HasMomentum) block.momentum[i] = m;
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
