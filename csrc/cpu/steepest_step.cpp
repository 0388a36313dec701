// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/steepest_step.h.
#include "math/steepest_step.h"

#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/steepest_blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

template <Power P, bool HasMomentum, typename T>
void step_block(const Operands<T> block, const SteepestNumbers<T> numbers) {
  if constexpr (P == Power::general) {
    alignas(64) T buffer[block_elements];
    const T* c = directions<HasMomentum>(block, numbers, buffer);
    const Logarithms<T> logs(c, block.n);
    const auto nothing = [](int64_t, T, T) {};
    logs.normal ? step_general<Range::normal, HasMomentum>(block, c, logs, numbers, nothing)
                : step_general<Range::any, HasMomentum>(block, c, logs, numbers, nothing);
  } else {
    // 32-byte vectors: with wider ones so short a loop runs so far ahead that memory serves it a tenth slower.
    const T* __restrict gradient = block.gradient;
    step_along<P, HasMomentum, 32>(block, numbers, [=](int64_t i) { return gradient[i]; }, [](int64_t, T, T) {});
  }
}

template <Power P, bool HasMomentum, typename T>
double power_sum_block(const Operands<T> block, const SteepestNumbers<T> numbers) {
  alignas(64) double powers[block_elements];  // |c|^q = c u(c); added up in a loop of their own, which then vectorises
  if constexpr (P == Power::general) {
    alignas(64) T buffer[block_elements];
    const T* c = directions<HasMomentum>(block, numbers, buffer);
    const Logarithms<T> logs(c, block.n);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) powers[i] = double(c[i]) * double(signed_power<P>(c[i], logs[i], numbers.exponent));
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
void for_each_block(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, bool writes,
                    const Visit& visit) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t chunk) {
    const Rounder rounder = rounder_of(rounding, tensors.weight_dtype, tensor, tensors.count, 0);
    for (int64_t at = begin; at < end; at += block_elements) {
      const int64_t n = at + block_elements < end ? block_elements : end - at;
      RoundedBlock<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n, rounder);
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
void step_all(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, const SteepestNumbers<T>& numbers) {
  for_each_block<T>(tensors, rounding, true,
                    [&](const Operands<T>& block, int64_t) { step_block<P, HasMomentum>(block, numbers); });
}

template <Power P, bool HasMomentum, typename T>
void power_all(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, const SteepestNumbers<T>& numbers,
               double* chunk_sums) {
  for_each_block<T>(tensors, rounding, false, [&](const Operands<T>& block, int64_t chunk) {
    chunk_sums[chunk] += power_sum_block<P, HasMomentum>(block, numbers);
  });
}

}  // namespace

void steepest_step_cpu(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options,
                       const pysteep_rounding& rounding) {
  if (read(options.found_inf) != 0) return;
  specialise(options.q, tensors.momentum != nullptr, tensors.weight_dtype, [&]<Power P, bool HasMomentum, typename T>() {
    step_all<P, HasMomentum>(tensors, rounding, steepest_numbers<T>(options));
  });
}

int64_t steepest_power_chunks(const pysteep_steepest_tensors& tensors) {
  int64_t chunks = 0;
  for (int64_t tensor = 0; tensor < tensors.count; ++tensor) chunks += chunks_of(tensors.numel[tensor]);
  return chunks;
}

void steepest_power_cpu(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options,
                        const pysteep_rounding& rounding, double* chunk_sums) {
  specialise(options.q, tensors.momentum != nullptr, tensors.weight_dtype, [&]<Power P, bool HasMomentum, typename T>() {
    power_all<P, HasMomentum>(tensors, rounding, steepest_numbers<T>(options), chunk_sums);
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
