// Rounding to 16 bits other than to the nearest. What it means: include/pysteep/rounding.h.
#pragma once

#include "math/dtype.h"
#include "math/philox.h"
#include "pysteep/rounding.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

constexpr uint32_t half_of_last_place = 0x8000;  // in the units of `extended`

PYSTEEP_INLINE uint32_t infinity_of(float16) { return 0x7c00; }
PYSTEEP_INLINE uint32_t infinity_of(bfloat16) { return 0x7f80; }

// |x| in units of 2^-16 of the last place of the format. Of infinity and NaN the 16 lowest bits are 0.
PYSTEEP_INLINE uint32_t extended(float x, bfloat16) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  return magnitude > 0x7f800000u ? (magnitude | 0x400000u) & 0xffff0000u : magnitude;
}

PYSTEEP_INLINE uint32_t extended(float x, float16) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - (uint32_t(127 - 15) << 23)) << 3;
  const bool is_subnormal = magnitude < (uint32_t(127 - 14) << 23);
  const uint32_t subnormal = uint32_t(int32_t(bit_cast<float>(is_subnormal ? magnitude : 0u) * 0x1p40f));
  uint32_t result = is_subnormal ? subnormal : normal;
  result = magnitude >= (uint32_t(127 + 16) << 23) ? 0x7c000000u : result;
  return magnitude > 0x7f800000u ? 0x7e000000u : result;
}

// The number that `extended` makes this of.
PYSTEEP_INLINE float contracted(uint32_t extended, bfloat16) { return bit_cast<float>(extended); }

PYSTEEP_INLINE float contracted(uint32_t extended, float16) {
  const uint32_t normal = (extended >> 3) + (uint32_t(127 - 15) << 23);
  const bool is_subnormal = extended < (0x0400u << 16);
  const float subnormal = float(int32_t(is_subnormal ? extended : 0u)) * 0x1p-40f;
  return is_subnormal ? subnormal : bit_cast<float>(normal);
}

template <typename Storage>
PYSTEEP_INLINE Storage with_sign_of(uint32_t magnitude, float x) {
  return {uint16_t(magnitude | (bit_cast<uint32_t>(x) >> 16 & 0x8000u))};
}

// `noise`: a random number below 2^16.
template <typename Storage>
PYSTEEP_INLINE void round_stochastically(float x, uint32_t noise, Storage& result) {
  result = with_sign_of<Storage>((extended(x, result) + noise) >> 16, x);
}

template <typename Storage>
PYSTEEP_INLINE void round_compensated(float x, Storage& result, int16_t& compensation) {
  const uint32_t all = extended(x, result);
  result = with_sign_of<Storage>((all + half_of_last_place) >> 16, x);
  compensation = int16_t(uint16_t(all));
}

// What round_compensated has split. A compensation that is left of another number does not turn the sign.
template <typename Storage>
PYSTEEP_INLINE float widen_compensated(Storage x, int16_t compensation) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const int32_t all = int32_t(magnitude << 16) + compensation;
  const float size = contracted(uint32_t(all < 0 ? 0 : all), x);
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  return magnitude >= infinity_of(x) ? widen(x) : bit_cast<float>(bit_cast<uint32_t>(size) | sign);
}

// The eight numbers below 2^16 of the elements from 8 `block` on, two a word, the lower bits first. Lane as in philox.h; of the
// elements of a vector `block` has the numbers of each.
template <typename Lane>
PYSTEEP_INLINE Words<Lane> rounding_noise(Lane block, uint32_t role, uint32_t step, uint32_t stream, uint64_t seed) {
  const Lane zero = block ^ block;
  const Words<Lane> counter{{block, (block >> 32) | uint64_t(role << 16), zero | uint64_t(step), zero | uint64_t(stream)}};
  return philox(counter, uint32_t(seed), uint32_t(seed >> 32));
}

PYSTEEP_INLINE Words<uint32_t> rounding_words(uint64_t block, uint32_t role, uint32_t step, uint32_t stream, uint64_t seed) {
  const Words<uint64_t> words = rounding_noise(block, role, step, stream, seed);
  return {{uint32_t(words.of[0]), uint32_t(words.of[1]), uint32_t(words.of[2]), uint32_t(words.of[3])}};
}

// The words are chosen among without an index, which would move them to a GPU's local memory.
PYSTEEP_INLINE uint32_t noise_of(const Words<uint32_t>& words, uint64_t element) {
  const uint32_t low = (element & 2) != 0 ? words.of[1] : words.of[0], high = (element & 2) != 0 ? words.of[3] : words.of[2];
  return ((element & 4) != 0 ? high : low) >> (element & 1) * 16 & 0xffffu;
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
