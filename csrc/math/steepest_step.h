// The arithmetic of steepest_step and its numbers. Formula and order of rounding: include/pysteep/steepest_step.h.
#pragma once

#include "math/dtype.h"
#include "math/signed_power.h"
#include "pysteep/steepest_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

PYSTEEP_INLINE double read(const pysteep_scalar& scalar) {
  if (scalar.address == nullptr) return scalar.value;
  return scalar.dtype == PYSTEEP_FLOAT64 ? *static_cast<const double*>(scalar.address)
                                         : double(*static_cast<const float*>(scalar.address));
}

// The options, each rounded once from double to the compute type.
template <typename T>
struct SteepestNumbers {
  T gradient_factor, coupled, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step;
  PowerExponent<T> exponent;
};

template <typename T>
PYSTEEP_INLINE SteepestNumbers<T> steepest_numbers(const pysteep_steepest_options& options) {
  const double lr = read(options.lr), beta1 = read(options.beta1), beta2 = read(options.beta2);
  const double inverse_scale = 1.0 / read(options.grad_scale);
  return {T(options.maximize ? -inverse_scale : inverse_scale),
          T(options.coupled_weight_decay),
          T(beta1),
          T(1.0 - beta1),
          T(beta2),
          T(1.0 - beta2),
          T(1.0 - lr * options.weight_decay),
          T(lr * read(options.step_scale)),
          PowerExponent<T>::of(options.q - 1.0)};
}

// The gradient that momentum sees.
template <typename T>
PYSTEEP_INLINE T steepest_gradient(T weight, T gradient, const SteepestNumbers<T>& numbers) {
  gradient = gradient * numbers.gradient_factor;
  return numbers.coupled == T(0) ? gradient : gradient + numbers.coupled * weight;
}

// c, the vector that the step follows.
template <bool HasMomentum, typename T>
PYSTEEP_INLINE T steepest_direction(T weight, T gradient, T momentum, const SteepestNumbers<T>& numbers) {
  gradient = steepest_gradient(weight, gradient, numbers);
  return HasMomentum ? numbers.beta1 * momentum + numbers.one_minus_beta1 * gradient : gradient;
}

// u is the signed power of steepest_direction of the same arguments.
template <bool HasMomentum, typename T>
PYSTEEP_INLINE void steepest_step(T& weight, T gradient, T& momentum, T u, const SteepestNumbers<T>& numbers) {
  if (HasMomentum) momentum = numbers.beta2 * momentum + numbers.one_minus_beta2 * steepest_gradient(weight, gradient, numbers);
  weight = weight * numbers.decay - numbers.step * u;
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
