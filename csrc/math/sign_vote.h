// The arithmetic of sign_vote, on bits alone: no mode that flushes subnormals changes a vote. Formulas:
// include/pysteep/sign_vote.h.
#pragma once

#include "math/dtype.h"
#include "math/portable.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// A storage type's numbers as integers.
template <typename Storage>
struct Pattern;
template <>
struct Pattern<float16> {
  using Bits = uint16_t;
  static constexpr Bits one = 0x3c00, infinity = 0x7c00, sign = 0x8000;
};
template <>
struct Pattern<bfloat16> {
  using Bits = uint16_t;
  static constexpr Bits one = 0x3f80, infinity = 0x7f80, sign = 0x8000;
};
template <>
struct Pattern<float> {
  using Bits = uint32_t;
  static constexpr Bits one = 0x3f800000, infinity = 0x7f800000, sign = 0x80000000;
};
template <>
struct Pattern<double> {
  using Bits = uint64_t;
  static constexpr Bits one = 0x3ff0000000000000, infinity = 0x7ff0000000000000, sign = 0x8000000000000000;
};
template <typename Storage>
using bits_t = typename Pattern<Storage>::Bits;

// 0 < x <= inf, and -inf <= x < 0: neither for zeros and NaN.
template <typename Storage>
PYSTEEP_INLINE bool is_positive(bits_t<Storage> x) {
  return bits_t<Storage>(x - 1) < Pattern<Storage>::infinity;
}
template <typename Storage>
PYSTEEP_INLINE bool is_negative(bits_t<Storage> x) {
  return is_positive<Storage>(x ^ Pattern<Storage>::sign);
}

// Where zeros send a 1, for words that begin at an even element.
PYSTEEP_INLINE uint32_t zeros_of(int64_t phase) { return (phase & 1) == 0 ? 0x55555555u : 0xaaaaaaaau; }

// The bits of as many elements, of which some are positive and some negative.
PYSTEEP_INLINE uint32_t packed(uint32_t positive, uint32_t negative, uint32_t zeros) {
  return positive | (~(positive | negative) & zeros);
}

// Numbers are added bit by bit in planes, the lowest first, one for each element that a word has a bit for.
template <typename Word>
PYSTEEP_INLINE void half_add(Word& plane, Word& carry) {
  const Word both = plane & carry;
  plane ^= carry;
  carry = both;
}

// From the highest plane down, starting with `more` of zeros and `equal` of ones: where a number is above the limit, whose bit
// of that plane is given, and where it is the same.
template <typename Word>
PYSTEEP_INLINE void compare(Word plane, bool limit, Word& more, Word& equal) {
  const Word bit = limit ? ~Word(0) : Word(0);
  more |= equal & plane & ~bit;
  equal &= ~(plane ^ bit);
}

// How many planes hold numbers up to `rows`.
PYSTEEP_INLINE int planes_of(int64_t rows) {
  int planes = 0;
  while (rows >> planes != 0) ++planes;
  return planes;
}

// 1, -1 or 0. Of an odd number of voters as many as half of them, rounded down, are no tie.
template <typename Storage>
PYSTEEP_INLINE Storage vote(bool more, bool tie) {
  using P = Pattern<Storage>;
  const bits_t<Storage> one = bits_t<Storage>(P::one | (more ? 0 : P::sign));
  return bit_cast<Storage>(tie ? bits_t<Storage>(0) : one);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
