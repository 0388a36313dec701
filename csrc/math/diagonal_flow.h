// The arithmetic of diagonal_flow beyond that of its factors' steps. Formula: include/pysteep/diagonal_flow.h.
#pragma once

#include "math/factor_step.h"
#include "math/philox.h"
#include "pysteep/diagonal_flow.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// df/dp of one row; `weight` is 1, or 1 / rows where the loss is a mean.
template <typename T>
PYSTEEP_INLINE T mean_square_slope(T prediction, T y, T weight) {
  return T(2) * (prediction - y) * weight;
}

template <typename T>
PYSTEEP_INLINE T exponential_slope(T prediction, T y, T weight) {
  constexpr T most = sizeof(T) == sizeof(float) ? T(88) : T(709);  // exp of more overflows
  const T exponent = -y * prediction;
  return -y * weight * T(::exp(exponent < most ? exponent : most));
}

// What the steepest step of a run's factors is told.
PYSTEEP_INLINE pysteep_steepest_options flow_options(const pysteep_diagonal_flows& flows, int64_t run) {
  const pysteep_scalar one{1, nullptr, PYSTEEP_FLOAT64}, none{0, nullptr, PYSTEEP_FLOAT64};
  return {flows.q[run],
          flows.weight_decay[run],
          flows.coupled_weight_decay[run],
          0,
          none,
          none,
          {flows.lr[run], nullptr, PYSTEEP_FLOAT64},
          one,
          one,
          none};
}

// The numbers of Adam's step `step`, counted from 0: lr and the second moment's root without the bias of their start at 0.
template <typename T>
struct AdamNumbers {
  T beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon, coupled, decay, step, inverse_root_bias;
};

template <typename T>
PYSTEEP_INLINE AdamNumbers<T> adam_numbers(const pysteep_diagonal_flows& flows, int64_t run, int64_t step) {
  const double count = double(step + 1), lr = flows.lr[run];
  return {T(flows.beta1),
          T(1 - flows.beta1),
          T(flows.beta2),
          T(1 - flows.beta2),
          T(flows.epsilon),
          T(flows.coupled_weight_decay[run]),
          T(1 - lr * flows.weight_decay[run]),
          T(lr / (1 - ::pow(flows.beta1, count))),
          T(1 / ::sqrt(1 - ::pow(flows.beta2, count)))};
}

// torch.optim.AdamW, and with `coupled` torch.optim.Adam.
template <typename T>
PYSTEEP_INLINE void adam_step(T& weight, T gradient, T& first_moment, T& second_moment, const AdamNumbers<T>& numbers) {
  gradient = gradient + numbers.coupled * weight;
  first_moment = numbers.beta1 * first_moment + numbers.one_minus_beta1 * gradient;
  second_moment = numbers.beta2 * second_moment + numbers.one_minus_beta2 * gradient * gradient;
  const T root = square_root(second_moment) * numbers.inverse_root_bias;
  weight = weight * numbers.decay - numbers.step * (first_moment / (root + numbers.epsilon));
}

// Word `j` & 3 of Philox's block of counter (step, j / 4) under the key `seed`.
PYSTEEP_INLINE uint32_t philox_word(uint64_t seed, uint64_t step, uint64_t j) {
  const Words<uint64_t> counter{{step, step >> 32, j >> 2, j >> 34}};
  const Words<uint64_t> words = philox<10>(counter, uint32_t(seed), uint32_t(seed >> 32));
  return uint32_t((j & 3) == 0 ? words.of[0] : (j & 3) == 1 ? words.of[1] : (j & 3) == 2 ? words.of[2] : words.of[3]);
}

PYSTEEP_INLINE int64_t drawn_row(uint64_t seed, int64_t step, int64_t j, int64_t rows) {
  return int64_t(uint64_t(philox_word(seed, uint64_t(step), uint64_t(j))) * uint64_t(rows) >> 32);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
