// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/factor_step.h.
#include "math/factor_step.h"

#include "cpu/factor_blocks.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/steepest_blocks.h"
#include "cpu/stream.h"
#include "pysteep/factor_product.h"
#include "pysteep/factor_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Tensors = pysteep_factor_tensors;

// The block [at, at + n) of one weight.
struct Part {
  const Tensors& tensors;
  const pysteep_rounding& rounding;
  int64_t tensor, at, n;
  bool streams;

  template <typename T>
  Block<T> gradient() const {
    return {tensors.gradient[tensor], tensors.gradient_dtype, at, n};
  }
  template <typename T>
  RoundedBlock<T> factor(int64_t k) const {
    const Rounder rounder = rounder_of(rounding, tensors.factor_dtype, tensor, tensors.count, k);
    return {tensors.factor[k * tensors.count + tensor], tensors.factor_dtype, at, n, rounder};
  }
  template <typename T>
  Block<T> momentum(int64_t k) const {
    return {tensors.momentum[k * tensors.count + tensor], tensors.momentum_dtype, at, n};
  }
  template <typename T>
  void store(const T* product) const {
    store_block(product, tensors.weight[tensor], tensors.weight_dtype, at, n, streams);
  }
};

// The steepest step of factor k along gradient_at(i); calls after(i, old, new). Afterwards `factor` holds what is stored.
template <Power P, bool HasMomentum, typename T, typename Gradient, typename After>
void step_factor(const Part& part, int64_t k, RoundedBlock<T>& factor, const SteepestNumbers<T>& numbers,
                 const Gradient& gradient_at, const After& after) {
  if constexpr (HasMomentum) {
    Block<T> momentum = part.momentum<T>(k);
    step_along<P, true, 64>(Operands<T>{factor.data(), nullptr, momentum.data(), part.n}, numbers, gradient_at, after);
    momentum.write_back();
  } else {
    step_along<P, false, 64>(Operands<T>{factor.data(), nullptr, nullptr, part.n}, numbers, gradient_at, after);
  }
  factor.write_back(true);
}

// ---- Pass by pass: any power, any dtypes, momentum ----

template <Power P, bool HasMomentum, typename T>
void step_full(const Part& part, const FactorNumbers<T>& numbers) {
  const int64_t last = part.tensors.depth - 1, n = part.n, size = block_size(part.tensors.depth, part.tensors.factor_dtype);
  alignas(64) T tails[tail_elements], head_block[block_elements], product[block_elements];
  T* const head = head_block;
  for (int64_t k = last; k > 0; --k) {
    RoundedBlock<T> factor = part.factor<T>(k);
    T* tail = tails + (k - 1) * size;
    k < last ? multiply(tail + size, factor.data(), n, tail) : copy(factor.data(), n, tail);
  }
  for (int64_t i = 0; i < n; ++i) tails[last * size + i] = T(1);  // one loop for all factors: of a second GCC makes a slow one
  scale(part.gradient<T>().data(), numbers.gradient_factor, n, head);
  for (int64_t k = 0; k <= last; ++k) {
    RoundedBlock<T> factor = part.factor<T>(k);
    const T* const tail = tails + k * size;
    const auto gradient_at = [=](int64_t i) { return factor_gradient(head[i], tail[i]); };
    const auto go_on = [=](int64_t i, T old, T) { head[i] = head[i] * old; };
    step_factor<P, HasMomentum>(part, k, factor, numbers.each, gradient_at, go_on);
    k == 0 ? copy(factor.data(), n, product) : multiply(product, factor.data(), n, product);
  }
  part.store(product);
}

template <Power P, bool HasMomentum, typename T>
void step_tied(const Part& part, const FactorNumbers<T>& numbers) {
  const int64_t n = part.n, exponent = part.tensors.depth - 2;
  alignas(64) T others[block_elements], gradients[2][block_elements], product[block_elements];
  T *const of_first = gradients[0], *const of_rest = gradients[1];
  RoundedBlock<T> first = part.factor<T>(0), rest = part.factor<T>(1);
  Block<T> gradient = part.gradient<T>();
  integer_powers(rest.data(), exponent, n, others);
  tied_gradients(gradient.data(), numbers.gradient_factor, first.data(), rest.data(), others, n, of_first, of_rest);
  const auto nothing = [](int64_t, T, T) {};
  step_factor<P, HasMomentum>(part, 0, first, numbers.each, [=](int64_t i) { return of_first[i]; }, nothing);
  step_factor<P, HasMomentum>(part, 1, rest, numbers.each, [=](int64_t i) { return of_rest[i]; }, nothing);
  integer_powers(rest.data(), exponent, n, others);
  tied_products(first.data(), rest.data(), others, n, product);
  part.store(product);
}

// ---- In registers: float32 factors in one loop, which then runs at memory's speed ----

constexpr int most_in_registers = 10;  // factors

template <typename T, int Count>
struct Factors {
  T* of[Count];
};

template <Power P, typename T>
PYSTEEP_INLINE T stepped(T factor, T gradient, const SteepestNumbers<T>& numbers) {
  T none = T(0);
  const T c = steepest_direction<false>(factor, gradient, none, numbers);
  steepest_step<false>(factor, gradient, none, signed_power<P>(c, {}, numbers.exponent), numbers);
  return factor;
}

// Numbers that the compiler sees are constants: with a choice left in it, the loop's vectors are full of masks.
template <bool HasCoupled, typename T>
PYSTEEP_INLINE FactorNumbers<T> simplified(FactorNumbers<T> numbers) {
  numbers.each.gradient_factor = T(1);
  if (!HasCoupled) numbers.each.coupled = T(0);
  return numbers;
}

template <int K, int Depth, typename T>
PYSTEEP_INLINE void tails_before(const T (&old)[Depth], T (&tail)[Depth]) {
  if constexpr (K > 0) {
    tail[K - 1] = K == Depth - 1 ? old[K] : tail[K] * old[K];
    tails_before<K - 1>(old, tail);
  }
}

template <int K, int Depth, typename T>
PYSTEEP_INLINE void load_from(const Factors<T, Depth>& factors, int64_t i, T (&old)[Depth]) {
  if constexpr (K < Depth) {
    old[K] = factors.of[K][i];
    load_from<K + 1>(factors, i, old);
  }
}

// The steps of factor K and those after it, from the product of those before; returns the product of all.
template <Power P, int K, int Depth, typename T>
PYSTEEP_INLINE T step_from(const Factors<T, Depth>& factors, int64_t i, const T (&old)[Depth], const T (&tail)[Depth], T head,
                           T product, const SteepestNumbers<T>& numbers) {
  if constexpr (K == Depth) {
    return product;
  } else {
    const T now = stepped<P>(old[K], K == Depth - 1 ? head : factor_gradient(head, tail[K]), numbers);
    factors.of[K][i] = now;
    return step_from<P, K + 1>(factors, i, old, tail, head * old[K], K == 0 ? now : product * now, numbers);
  }
}

template <Power P, bool HasCoupled, int Depth, typename T>
void step_full_in_registers(const T* gradient, int64_t n, const Factors<T, Depth> factors, FactorNumbers<T> numbers,
                            T* product) {
  numbers = simplified<HasCoupled>(numbers);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T old[Depth], tail[Depth];
    load_from<0>(factors, i, old);
    tails_before<Depth - 1>(old, tail);
    product[i] = step_from<P, 0>(factors, i, old, tail, gradient[i] * numbers.gradient_factor, T(1), numbers.each);
  }
}

template <Power P, bool HasCoupled, int Bits, typename T>
void step_tied_in_registers(const T* gradient, int64_t n, const Factors<T, 2> factors, int64_t exponent,
                            FactorNumbers<T> numbers, T* product) {
  numbers = simplified<HasCoupled>(numbers);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T first = factors.of[0][i], rest = factors.of[1][i], others = integer_power<Bits>(rest, exponent);
    const T g = gradient[i] * numbers.gradient_factor;
    const T first_now = stepped<P>(first, tied_gradient_of_first(g, rest, others), numbers.each);
    const T rest_now = stepped<P>(rest, tied_gradient_of_rest(g, first, others), numbers.each);
    factors.of[0][i] = first_now;
    factors.of[1][i] = rest_now;
    product[i] = tied_product(first_now, rest_now, integer_power<Bits>(rest_now, exponent));
  }
}

template <Power P, bool HasCoupled, int Depth, typename T>
void step_full_of_depth(const Part& part, const FactorNumbers<T>& numbers, T* product) {
  if constexpr (Depth <= most_in_registers) {
    if (part.tensors.depth != Depth) return step_full_of_depth<P, HasCoupled, Depth + 1>(part, numbers, product);
    Factors<T, Depth> factors;
    for (int k = 0; k < Depth; ++k) factors.of[k] = part.factor<T>(k).data();
    step_full_in_registers<P, HasCoupled>(part.gradient<T>().data(), part.n, factors, numbers, product);
  }
}

template <Power P, bool HasCoupled, int Bits, typename T>
void step_tied_of_bits(const Part& part, const FactorNumbers<T>& numbers, T* product) {
  if constexpr (Bits <= 5) {
    const int64_t exponent = part.tensors.depth - 2;
    if (highest_bit(exponent) != Bits) return step_tied_of_bits<P, HasCoupled, Bits + 1>(part, numbers, product);
    const Factors<T, 2> factors{{part.factor<T>(0).data(), part.factor<T>(1).data()}};
    step_tied_in_registers<P, HasCoupled, Bits>(part.gradient<T>().data(), part.n, factors, exponent, numbers, product);
  }
}

template <Power P, bool HasMomentum, typename T>
bool goes_in_registers(const Tensors& tensors) {
  const bool in_place = tensors.factor_dtype == PYSTEEP_FLOAT32 && tensors.gradient_dtype == PYSTEEP_FLOAT32;
  return P != Power::general && !HasMomentum && sizeof(T) == sizeof(float) && in_place && tensors.depth > 1 &&
         tensors.depth <= PYSTEEP_MAX_DEPTH && (tensors.stored < tensors.depth || tensors.depth <= most_in_registers);
}

template <Power P, bool HasCoupled, typename T>
void step_in_registers(const Part& part, const FactorNumbers<T>& numbers) {
  alignas(64) T product[block_elements];
  part.tensors.stored < part.tensors.depth ? step_tied_of_bits<P, HasCoupled, 0>(part, numbers, product)
                                           : step_full_of_depth<P, HasCoupled, 2>(part, numbers, product);
  part.store(product);
}

template <Power P, bool HasMomentum, typename T>
void step_all(const Tensors& tensors, const pysteep_rounding& rounding, const FactorNumbers<T>& numbers) {
  int64_t total = 0;
  for (int64_t tensor = 0; tensor < tensors.count; ++tensor) total += tensors.numel[tensor];
  const bool tied = tensors.stored < tensors.depth, in_registers = goes_in_registers<P, HasMomentum, T>(tensors);
  const int64_t size = in_registers ? block_elements : block_size(tensors.stored, tensors.factor_dtype);
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; at += size) {
      const Part part{tensors, rounding, tensor, at, at + size < end ? size : end - at, total >= streamed_elements};
      if constexpr (P != Power::general && !HasMomentum && sizeof(T) == sizeof(float)) {
        if (in_registers) {
          numbers.each.coupled == T(0) ? step_in_registers<P, false>(part, numbers) : step_in_registers<P, true>(part, numbers);
          continue;
        }
      }
      tied ? step_tied<P, HasMomentum>(part, numbers) : step_full<P, HasMomentum>(part, numbers);
    }
    finish_streaming();
  });
}

}  // namespace

void factor_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options, const pysteep_rounding& rounding) {
  if (read(options.found_inf) != 0) return;
  specialise(options.q, tensors.momentum != nullptr, tensors.weight_dtype, [&]<Power P, bool HasMomentum, typename T>() {
    step_all<P, HasMomentum>(tensors, rounding, factor_numbers<T>(options));
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
