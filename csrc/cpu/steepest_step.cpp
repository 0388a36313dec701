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

// Adds |c|^q = c u(c) of the i-th element of a block to the i-th lane: an order of summation that no width of vectors changes.
template <Power P, bool HasMomentum, typename T>
void add_powers(const Operands<T> block, const SteepestNumbers<T> numbers, double* __restrict lanes) {
  if constexpr (P == Power::general) {
    alignas(64) T buffer[block_elements];
    const T* c = directions<HasMomentum>(block, numbers, buffer);
    const Logarithms<T> logs(c, block.n);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) lanes[i] += double(c[i]) * double(signed_power<P>(c[i], logs[i], numbers.exponent));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      const T m = HasMomentum ? block.momentum[i] : T(0);
      const T c = steepest_direction<HasMomentum>(block.weight[i], block.gradient[i], m, numbers);
      lanes[i] += double(c) * double(signed_power<P>(c, {}, numbers.exponent));
    }
  }
}

// The smallest that is not less than `count`.
int64_t power_of_two(int64_t count) {
  int64_t power = 1;
  while (power < count) power *= 2;
  return power;
}

// The i-th number and that half the array further on, until one is left. `count` is a power of two. More zeros at the end
// change no bit.
double sum_in_halves(double* numbers, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2)
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) numbers[i] += numbers[i + half];
  return numbers[0];
}

// Calls visit(operands) on the blocks of the elements [begin, end) of a tensor, in the compute type.
template <typename T, typename Visit>
void for_each_block(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, bool writes, int64_t tensor,
                    int64_t begin, int64_t end, const Visit& visit) {
  const Rounder rounder = rounder_of(rounding, tensors.weight_dtype, tensor, tensors.count, 0);
  for (int64_t at = begin; at < end; at += block_elements) {
    const int64_t n = at + block_elements < end ? block_elements : end - at;
    RoundedBlock<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n, rounder);
    Block<T> gradient(const_cast<void*>(tensors.gradient[tensor]), tensors.gradient_dtype, at, n);
    if (tensors.momentum == nullptr) {
      visit(Operands<T>{weight.data(), gradient.data(), nullptr, n});
    } else {
      Block<T> momentum(tensors.momentum[tensor], tensors.momentum_dtype, at, n);
      visit(Operands<T>{weight.data(), gradient.data(), momentum.data(), n});
      if (writes) momentum.write_back();
    }
    if (writes) weight.write_back();
  }
}

template <Power P, bool HasMomentum, typename T>
void step_all(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, const SteepestNumbers<T>& numbers) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    for_each_block<T>(tensors, rounding, true, tensor, begin, end,
                      [&](const Operands<T>& block) { step_block<P, HasMomentum>(block, numbers); });
  });
}

template <Power P, bool HasMomentum, typename T>
void power_all(const pysteep_steepest_tensors& tensors, const pysteep_rounding& rounding, const SteepestNumbers<T>& numbers,
               double* chunk_sums) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t chunk) {
    alignas(64) double lanes[block_elements];
    const int64_t used = power_of_two(end - begin < block_elements ? end - begin : block_elements);
    for (int64_t i = 0; i < used; ++i) lanes[i] = 0;
    for_each_block<T>(tensors, rounding, false, tensor, begin, end,
                      [&](const Operands<T>& block) { add_powers<P, HasMomentum>(block, numbers, lanes); });
    chunk_sums[chunk] = sum_in_halves(lanes, used);
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

// The length of chunk_sums: the number of chunks, and zeros up to a power of two.
int64_t steepest_power_chunks(const pysteep_steepest_tensors& tensors) {
  int64_t chunks = 0;
  for (int64_t tensor = 0; tensor < tensors.count; ++tensor) chunks += chunks_of(tensors.numel[tensor]);
  return power_of_two(chunks);
}

double steepest_power_cpu(const pysteep_steepest_tensors& tensors, const pysteep_steepest_options& options,
                          const pysteep_rounding& rounding, double* chunk_sums) {
  specialise(options.q, tensors.momentum != nullptr, tensors.weight_dtype, [&]<Power P, bool HasMomentum, typename T>() {
    power_all<P, HasMomentum>(tensors, rounding, steepest_numbers<T>(options), chunk_sums);
  });
  return sum_in_halves(chunk_sums, steepest_power_chunks(tensors));
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
