// How a thread's weights or factors of 16 bits are rounded. The arithmetic is in math/rounding.h.
#pragma once

#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "math/rounding.h"
#include "math/steepest_step.h"

namespace pysteep::cuda {

// What a call asks of numbers of `dtype`; null: nothing but the nearest.
inline const pysteep_rounding* other_than_nearest(const pysteep_rounding* rounding, pysteep_dtype dtype) {
  const bool is_narrow = dtype == PYSTEEP_FLOAT16 || dtype == PYSTEEP_BFLOAT16;
  return is_narrow && rounding->mode != PYSTEEP_NEAREST ? rounding : nullptr;
}

// The same for a pass that only reads them.
inline const pysteep_rounding* compensated(const pysteep_rounding* rounding, pysteep_dtype dtype) {
  return rounding->mode == PYSTEEP_COMPENSATED ? other_than_nearest(rounding, dtype) : nullptr;
}

// To the nearest. An element has nothing beside it.
template <typename Table>
struct ToNearest {
  using Beside = None;
  PYSTEEP_INLINE explicit ToNearest(const Table&) {}

  template <typename Storage>
  PYSTEEP_INLINE compute_t<Storage> widen(Storage x, None) const {
    return pysteep::widen(x);
  }
  template <typename Storage>
  PYSTEEP_INLINE void narrow(compute_t<Storage> x, Storage& result, None&) const {
    pysteep::narrow(x, result);
  }
};

// The four words from number `skipped` of eight on, of 16 bits each; `next` follows `words`.
PYSTEEP_INLINE Words<uint32_t> words_from(const Words<uint32_t>& words, const Words<uint32_t>& next, int skipped) {
  uint32_t word[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = words.of[i], word[4 + i] = next.of[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) word[i] = (skipped & 4) != 0 ? word[i + 2] : word[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) word[i] = (skipped & 2) != 0 ? word[i + 1] : word[i];
  Words<uint32_t> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.of[i] = (skipped & 1) != 0 ? word[i] >> 16 | word[i + 1] << 16 : word[i];
  return result;
}

// As a call asks for, stochastically or compensated: told apart at run time, so that the kernels stay few. Both take 16 bits
// beside an element: its random number, or its compensation, which rounding replaces.
template <typename Table>
struct AsAsked {
  using Beside = uint16_t;
  const Table& table;
  bool compensated;
  uint32_t step;

  PYSTEEP_INLINE explicit AsAsked(const Table& table)
      : table(table),
        compensated(table.rounding.mode == PYSTEEP_COMPENSATED),
        step(compensated ? 0 : uint32_t(int64_t(read(table.rounding.step)))) {}

  // Of N elements from `at` on; zeros where rounding is stochastic.
  template <int N>
  PYSTEEP_INLINE Vector<uint16_t, N> load_compensation(int tensor, int role, int64_t at) const {
    if (compensated) return load<uint16_t, N>(table.compensation(role, tensor), at);
    return {};
  }
  template <int N>
  PYSTEEP_INLINE void store_compensation(const Vector<uint16_t, N>& beside, int tensor, int role, int64_t at) const {
    if (compensated) store(beside, table.compensation(role, tensor), at);
  }

  // Random numbers for N elements, one or eight, where rounding is stochastic, else what is there.
  template <int N>
  PYSTEEP_INLINE void draw(Vector<uint16_t, N>& beside, int tensor, int role, int64_t at) const {
    static_assert(N == 1 || N == 8);
    if (compensated) return;
    const uint64_t element = uint64_t(table.first(tensor) + at), block = element >> 3, seed = table.rounding.seed;
    const uint32_t stream = table.stream(tensor);
    Words<uint32_t> words = rounding_words(block, uint32_t(role), step, stream, seed);
    if constexpr (N == 1) {
      beside.element[0] = uint16_t(noise_of(words, element));
    } else {
      const int skipped = int(element & 7);
      if (skipped != 0) words = words_from(words, rounding_words(block + 1, uint32_t(role), step, stream, seed), skipped);
      std::memcpy(&beside, &words, sizeof(beside));
    }
  }

  template <typename Storage>
  PYSTEEP_INLINE float widen(Storage x, uint16_t beside) const {
    return widen_compensated(x, compensated ? int16_t(beside) : int16_t(0));
  }
  template <typename Storage>
  PYSTEEP_INLINE void narrow(float x, Storage& result, uint16_t& beside) const {
    round_stochastically(x, compensated ? half_of_last_place : beside, result);
    beside = uint16_t(extended(x, result));
  }
};

template <bool Rounds, typename Table>
using Rounder = std::conditional_t<Rounds, AsAsked<Table>, ToNearest<Table>>;

}  // namespace pysteep::cuda
