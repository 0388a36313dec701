// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/steepest_step.h.
#include "math/steepest_step.h"

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

// The arguments of a block of elements; momentum is null without one.
template <typename T>
struct Operands {
  T* __restrict weight;
  const T* __restrict gradient;
  T* __restrict momentum;
  int64_t n;
};

// c and log2|c| of a block at general q. A loop of their own: in one loop with the exponential, the chain of dependent
// operations is so long that a core's window holds fewer than two iterations of it.
template <bool HasMomentum, typename T>
struct Logarithms {
  const T* c;
  bool normal;
  alignas(64) T direction[block_elements], whole[block_elements], fraction[block_elements];

  Logarithms(const Operands<T> block, const SteepestNumbers<T> numbers) : c(block.gradient) {
    if (HasMomentum || numbers.coupled != T(0) || numbers.gradient_factor != T(1)) {
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i)
        direction[i] = steepest_direction<HasMomentum>(block.weight[i], block.gradient[i],
                                                       HasMomentum ? block.momentum[i] : T(0), numbers);
      c = direction;
    }
    normal = fill<Range::normal>(block.n);
    if (!normal) fill<Range::any>(block.n);
  }

  // Whether every c lies in Range::normal.
  template <Range R>
  bool fill(int64_t n) {
    const T* __restrict source = c;
    auto largest = Extent<T>().largest, smallest = Extent<T>().smallest;
#pragma omp simd reduction(max : largest) reduction(min : smallest)
    for (int64_t i = 0; i < n; ++i) {
      const Logarithm<T> log = logarithm<Power::general, R>(source[i]);
      whole[i] = log.whole;
      fraction[i] = log.fraction;
      const auto size = Extent<T>::size(source[i]);
      largest = size > largest ? size : largest;
      smallest = size - 1 < smallest ? size - 1 : smallest;
    }
    return Extent<T>{largest, smallest}.is_normal();
  }
};

template <Range R, bool HasMomentum, typename T>
void step_general(const Operands<T> block, const Logarithms<HasMomentum, T>& logs, const SteepestNumbers<T> numbers) {
  const T* c = logs.c;
#pragma omp simd
  for (int64_t i = 0; i < block.n; ++i) {
    T m = HasMomentum ? block.momentum[i] : T(0);
    const T u = signed_power<Power::general, R>(c[i], Logarithm<T>{logs.whole[i], logs.fraction[i]}, numbers.exponent);
    steepest_step<HasMomentum>(block.weight[i], block.gradient[i], m, u, numbers);
    if (HasMomentum) block.momentum[i] = m;
  }
}

template <Power P, bool HasMomentum, typename T>
void step_block(const Operands<T> block, const SteepestNumbers<T> numbers) {
  if constexpr (P == Power::general) {
    const Logarithms<HasMomentum, T> logs(block, numbers);
    logs.normal ? step_general<Range::normal>(block, logs, numbers) : step_general<Range::any>(block, logs, numbers);
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

template <Power P, bool HasMomentum, typename T>
double power_sum_block(const Operands<T> block, const SteepestNumbers<T> numbers) {
  alignas(64) double powers[block_elements];  // |c|^q = c u(c); added up in a loop of their own, which then vectorises
  if constexpr (P == Power::general) {
    const Logarithms<HasMomentum, T> logs(block, numbers);
    const T* c = logs.c;
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i)
      powers[i] = double(c[i]) * double(signed_power<P>(c[i], Logarithm<T>{logs.whole[i], logs.fraction[i]}, numbers.exponent));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      const T m = HasMomentum ? block.momentum[i] : T(0);
      const T c = steepest_direction<HasMomentum>(block.weight[i], block.gradient[i], m, numbers);
      powers[i] = double(c) * double(signed_power<P>(c, {}, numbers.exponent));
    }
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < block.n; ++i) sum += powers[i];
  return sum;
}

// Calls visit(operands, chunk) on blocks in the compute type.
template <typename T, typename Visit>
void for_each_block(const pysteep_steepest_tensors& tensors, bool writes, const Visit& visit) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t at = begin; at < end; at += block_elements) {
      const int64_t n = at + block_elements < end ? block_elements : end - at;
      Block<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n);
      Block<T> gradient(const_cast<void*>(tensors.gradient[tensor]), tensors.gradient_dtype, at, n);
      if (tensors.momentum == nullptr) {
        visit(Operands<T>{weight.data(), gradient.data(), nullptr, n}, chunk);
      } else {
        Block<T> momentum(tensors.momentum[tensor], tensors.momentum_dtype, at, n);
        visit(Operands<T>{weight.data(), gradient.data(), momentum.data(), n}, chunk);
        if (writes) momentum.write_back();
      }
      if (writes) weight.write_back();
    }
  });
}

template <Power P, bool HasMomentum, typename T>
void step_all(const pysteep_steepest_tensors& tensors, const SteepestNumbers<T>& numbers) {
  for_each_block<T>(tensors, true, [&](const Operands<T>& block, int64_t) { step_block<P, HasMomentum>(block, numbers); });
}

template <Power P, bool HasMomentum, typename T>
void power_all(const pysteep_steepest_tensors& tensors, const SteepestNumbers<T>& numbers, double* chunk_sums) {
  for_each_block<T>(tensors, false, [&](const Operands<T>& block, int64_t chunk) {
    chunk_sums[chunk] += power_sum_block<P, HasMomentum>(block, numbers);
  });
}

// Calls run.template operator()<P, HasMomentum>(numbers) with the types and constants that the call asks for.
template <typename T, bool HasMomentum, typename Run>
void specialise_power(const pysteep_steepest_options& options, const Run& run) {
  const SteepestNumbers<T> numbers = steepest_numbers<T>(options);
  switch (power_of(options.q)) {
    case Power::sign:
      return run.template operator()<Power::sign, HasMomentum>(numbers);
    case Power::root:
      return run.template operator()<Power::root, HasMomentum>(numbers);
    case Power::identity:
      return run.template operator()<Power::identity, HasMomentum>(numbers);
    case Power::general:
      return run.template operator()<Power::general, HasMomentum>(numbers);
  }
}

template <typename Run>
void specialise(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options, const Run& run) {
  const bool momentum = tensors.momentum != nullptr;
  if (tensors.weight_dtype == PYSTEEP_FLOAT64)
    momentum ? specialise_power<double, true>(options, run) : specialise_power<double, false>(options, run);
  else
    momentum ? specialise_power<float, true>(options, run) : specialise_power<float, false>(options, run);
}

}  // namespace

void steepest_step_cpu(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options) {
  if (read(options.found_inf) != 0) return;
  specialise(tensors, options,
             [&]<Power P, bool HasMomentum>(const auto& numbers) { step_all<P, HasMomentum>(tensors, numbers); });
}

int64_t steepest_power_chunks(const pysteep_steepest_tensors& tensors) {
  int64_t chunks = 0;
  for (int64_t tensor = 0; tensor < tensors.count; ++tensor) chunks += chunks_of(tensors.numel[tensor]);
  return chunks;
}

void steepest_power_cpu(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options, double* chunk_sums) {
  specialise(tensors, options,
             [&]<Power P, bool HasMomentum>(const auto& numbers) { power_all<P, HasMomentum>(tensors, numbers, chunk_sums); });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
