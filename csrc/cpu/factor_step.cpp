// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/factor_step.h.
#include "math/factor_step.h"

#include "cpu/factor_blocks.h"
#include "cpu/parallel.h"
#include "cpu/steepest_blocks.h"
#include "cpu/stream.h"
#include "pysteep/factor_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Tensors = pysteep_factor_tensors;

// The block [at, at + n) of one weight.
struct Part {
  const Tensors& tensors;
  int64_t tensor, at, n;
  bool streams;

  template <typename T>
  Block<T> gradient() const {
    return {tensors.gradient[tensor], tensors.gradient_dtype, at, n};
  }
  template <typename T>
  Block<T> factor(int64_t k) const {
    return {tensors.factor[k * tensors.count + tensor], tensors.factor_dtype, at, n};
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
void step_factor(const Part& part, int64_t k, Block<T>& factor, const SteepestNumbers<T>& numbers, const Gradient& gradient_at,
                 const After& after) {
  if constexpr (HasMomentum) {
    Block<T> momentum = part.momentum<T>(k);
    step_along<P, true, 64>(Operands<T>{factor.data(), nullptr, momentum.data(), part.n}, numbers, gradient_at, after);
    momentum.write_back();
  } else {
    step_along<P, false, 64>(Operands<T>{factor.data(), nullptr, nullptr, part.n}, numbers, gradient_at, after);
  }
  factor.write_back(true);
}

template <Power P, bool HasMomentum, typename T>
void step_full(const Part& part, const FactorNumbers<T>& numbers) {
  const int64_t last = part.tensors.depth - 1, n = part.n, size = block_size(part.tensors.depth, part.tensors.factor_dtype);
  const bool as_computed = part.tensors.factor_dtype == dtype_of<T>();  // a factor is stored as it was computed
  alignas(64) T tails[tail_elements], head_block[block_elements], product_block[block_elements];
  T *const head = head_block, *const product = product_block;
  for (int64_t k = last; k > 0; --k) {
    Block<T> factor = part.factor<T>(k);
    T* tail = tails + (k - 1) * size;
    k < last ? multiply(tail + size, factor.data(), n, tail) : copy(factor.data(), n, tail);
  }
  scale(part.gradient<T>().data(), numbers.gradient_factor, n, head);
  for (int64_t k = 0; k <= last; ++k) {
    Block<T> factor = part.factor<T>(k);
    const T* const tail = tails + k * size;
    const auto inner = [=](int64_t i) { return factor_gradient(head[i], tail[i]); };
    const auto outer = [=](int64_t i) { return head[i]; };
    const auto begin = [=](int64_t i, T old, T now) { head[i] = head[i] * old, product[i] = now; };
    const auto go_on = [=](int64_t i, T old, T now) { head[i] = head[i] * old, product[i] = product[i] * now; };
    const auto end = [=](int64_t i, T, T now) { product[i] = product[i] * now; };
    const auto only = [=](int64_t i, T old, T) { head[i] = head[i] * old; };
    if (!as_computed || last == 0) {
      k < last ? step_factor<P, HasMomentum>(part, k, factor, numbers.each, inner, only)
               : step_factor<P, HasMomentum>(part, k, factor, numbers.each, outer, only);
      k == 0 ? copy(factor.data(), n, product) : multiply(product, factor.data(), n, product);
    } else if (k == 0) {
      step_factor<P, HasMomentum>(part, k, factor, numbers.each, inner, begin);
    } else if (k < last) {
      step_factor<P, HasMomentum>(part, k, factor, numbers.each, inner, go_on);
    } else {
      step_factor<P, HasMomentum>(part, k, factor, numbers.each, outer, end);
    }
  }
  part.store(product);
}

template <Power P, bool HasMomentum, typename T>
void step_tied(const Part& part, const FactorNumbers<T>& numbers) {
  const int64_t n = part.n, exponent = part.tensors.depth - 2;
  alignas(64) T others[block_elements], gradients[2][block_elements], product[block_elements];
  T *const of_first = gradients[0], *const of_rest = gradients[1];
  Block<T> first = part.factor<T>(0), rest = part.factor<T>(1), gradient = part.gradient<T>();
  integer_powers(rest.data(), exponent, n, others);
  tied_gradients(gradient.data(), numbers.gradient_factor, first.data(), rest.data(), others, n, of_first, of_rest);
  const auto nothing = [](int64_t, T, T) {};
  step_factor<P, HasMomentum>(part, 0, first, numbers.each, [=](int64_t i) { return of_first[i]; }, nothing);
  step_factor<P, HasMomentum>(part, 1, rest, numbers.each, [=](int64_t i) { return of_rest[i]; }, nothing);
  integer_powers(rest.data(), exponent, n, others);
  tied_products(first.data(), rest.data(), others, n, product);
  part.store(product);
}

template <Power P, bool HasMomentum, typename T>
void step_all(const Tensors& tensors, const FactorNumbers<T>& numbers) {
  int64_t total = 0;
  for (int64_t tensor = 0; tensor < tensors.count; ++tensor) total += tensors.numel[tensor];
  const bool tied = tensors.stored < tensors.depth;
  const int64_t size = block_size(tensors.stored, tensors.factor_dtype);
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; at += size) {
      const Part part{tensors, tensor, at, at + size < end ? size : end - at, total >= streamed_elements};
      tied ? step_tied<P, HasMomentum>(part, numbers) : step_full<P, HasMomentum>(part, numbers);
    }
    finish_streaming();
  });
}

}  // namespace

void factor_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options) {
  if (read(options.found_inf) != 0) return;
  specialise(options.q, tensors.momentum != nullptr, tensors.weight_dtype,
             [&]<Power P, bool HasMomentum, typename T>() { step_all<P, HasMomentum>(tensors, factor_numbers<T>(options)); });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
