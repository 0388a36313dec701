// Philox4x32 [Salmon et al. 2011]: random words that depend on nothing but a counter and a key. Ten rounds are its default;
// seven are the fewest that pass every test of randomness there.
#pragma once

#include "math/portable.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// The lower 32 bits of each are the word; the others may be anything. Lane: uint64_t, or a vector of it.
template <typename Lane>
struct Words {
  Lane of[4];
};

// The 64 bits of a word's product.
template <typename Lane>
struct Product;
template <>
struct Product<uint64_t> {
  static PYSTEEP_INLINE uint64_t of(uint64_t word, uint32_t factor) { return uint64_t(uint32_t(word)) * factor; }
};

template <int Rounds, typename Lane>
PYSTEEP_INLINE Words<Lane> philox(const Words<Lane>& counter, uint32_t key0, uint32_t key1) {
  if constexpr (Rounds == 0) {
    return counter;
  } else {
    const Lane first = Product<Lane>::of(counter.of[0], 0xD2511F53u), second = Product<Lane>::of(counter.of[2], 0xCD9E8D57u);
    const Words<Lane> next{
        {(second >> 32) ^ counter.of[1] ^ uint64_t(key0), second, (first >> 32) ^ counter.of[3] ^ uint64_t(key1), first}};
    return philox<Rounds - 1>(next, key0 + 0x9E3779B9u, key1 + 0xBB67AE85u);
  }
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
