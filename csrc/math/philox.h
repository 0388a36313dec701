// Philox4x32-10 [Salmon et al. 2011]: random words that depend on nothing but a counter and a key.
#pragma once

#include "math/portable.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

struct Words {
  uint32_t of[4];
};

// Without a loop, for vectors.
template <int Rounds = 10>
PYSTEEP_INLINE Words philox(const Words counter, uint32_t key0, uint32_t key1) {
  if constexpr (Rounds == 0) {
    return counter;
  } else {
    const uint64_t first = uint64_t(0xD2511F53u) * counter.of[0], second = uint64_t(0xCD9E8D57u) * counter.of[2];
    const Words next{{uint32_t(second >> 32) ^ counter.of[1] ^ key0, uint32_t(second),
                      uint32_t(first >> 32) ^ counter.of[3] ^ key1, uint32_t(first)}};
    return philox<Rounds - 1>(next, key0 + 0x9E3779B9u, key1 + 0xBB67AE85u);
  }
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
