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

// |x| in units of 2^-16 of the last place of the format, with the sign of x in the highest bit. Of infinity and NaN the 16
// lowest bits are 0.
PYSTEEP_INLINE uint32_t extended(float x, bfloat16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? (bits | 0x400000u) & 0xffff0000u : bits;
}

PYSTEEP_INLINE uint32_t extended(float x, float16) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (uint32_t(127 - 15) << 23)) << 3;
  const bool is_subnormal = magnitude < (uint32_t(127 - 14) << 23);
  const uint32_t subnormal = uint32_t(int32_t(bit_cast<float>(is_subnormal ? magnitude : 0u) * 0x1p40f));
  uint32_t result = is_subnormal ? subnormal : normal;
  result = magnitude >= (uint32_t(127 + 16) << 23) ? 0x7c000000u : result;
  result = x != x ? 0x7e000000u : result;
  return result | (bits & 0x80000000u);
}

// The number that `extended` makes this of.
PYSTEEP_INLINE float contracted(uint32_t extended, bfloat16) { return bit_cast<float>(extended); }

PYSTEEP_INLINE float contracted(uint32_t extended, float16) {
  constexpr uint32_t rebias = uint32_t(127 - 15) << 23;
  const uint32_t magnitude = extended & 0x7fffffffu, normal = (magnitude >> 3) + rebias;
  const bool is_subnormal = magnitude < (0x0400u << 16);
  const float subnormal = float(int32_t(is_subnormal ? magnitude : 0u)) * 0x1p-40f;
  uint32_t bits = magnitude >= 0x7c000000u ? normal + rebias : normal;
  bits = is_subnormal ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (extended & 0x80000000u));
}

// `noise`: a random number below 2^16.
template <typename Storage>
PYSTEEP_INLINE void round_stochastically(float x, uint32_t noise, Storage& result) {
  result.bits = uint16_t((extended(x, result) + noise) >> 16);
}

template <typename Storage>
PYSTEEP_INLINE void round_compensated(float x, Storage& result, int16_t& compensation) {
  const uint32_t all = extended(x, result);
  result.bits = uint16_t((all + half_of_last_place) >> 16);
  compensation = int16_t(uint16_t(all));
}

// What round_compensated has split. A 0 that somebody wrote has no use for a compensation below it, infinity and NaN for none.
template <typename Storage>
PYSTEEP_INLINE float widen_compensated(Storage x, int16_t compensation) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const bool alone = magnitude >= infinity_of(x) || (magnitude == 0 && compensation < 0);
  return contracted((uint32_t(x.bits) << 16) + uint32_t(alone ? 0 : int32_t(compensation)), x);
}

// The eight numbers below 2^16 of the elements from 16 `pair` on, two a word, the lower bits first; those of the next eight are
// inverted. Lane as in philox.h; of the elements of a vector `pair` has the numbers of each.
template <typename Lane>
PYSTEEP_INLINE Words<Lane> rounding_noise(Lane pair, uint32_t role, uint32_t step, uint32_t stream, uint64_t seed) {
  const Lane zero = pair ^ pair;
  const Words<Lane> counter{{pair, (pair >> 32) | uint64_t(role << 16), zero | uint64_t(step), zero | uint64_t(stream)}};
  return philox<7>(counter, uint32_t(seed), uint32_t(seed >> 32));
}

// Those of the eight elements from 8 `block` on.
PYSTEEP_INLINE Words<uint32_t> rounding_words(uint64_t block, uint32_t role, uint32_t step, uint32_t stream, uint64_t seed) {
  const Words<uint64_t> words = rounding_noise(block >> 1, role, step, stream, seed);
  const uint32_t inverted = (block & 1) != 0 ? 0xffffffffu : 0u;
  return {{uint32_t(words.of[0]) ^ inverted, uint32_t(words.of[1]) ^ inverted, uint32_t(words.of[2]) ^ inverted,
           uint32_t(words.of[3]) ^ inverted}};
}

// The words are chosen among without an index, which would move them to a GPU's local memory.
PYSTEEP_INLINE uint32_t noise_of(const Words<uint32_t>& words, uint64_t element) {
  const uint32_t low = (element & 2) != 0 ? words.of[1] : words.of[0], high = (element & 2) != 0 ? words.of[3] : words.of[2];
  return ((element & 4) != 0 ? high : low) >> (element & 1) * 16 & 0xffffu;
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
