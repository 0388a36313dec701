// Blocks of 16-bit numbers, rounded as a call asks for. The arithmetic is in math/rounding.h.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <bit>

#include "cpu/blocks.h"
#include "math/rounding.h"
#include "math/steepest_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// How the numbers of one tensor are rounded.
struct Rounder {
  pysteep_rounding_mode mode = PYSTEEP_NEAREST;
  uint64_t seed = 0;
  uint32_t step = 0, stream = 0, role = 0;
  int64_t first = 0;
  int16_t* compensation = nullptr;
};

// Of tensor `tensor` of the `count` of a call; `role` as in pysteep/rounding.h.
inline Rounder rounder_of(const pysteep_rounding& rounding, pysteep_dtype dtype, int64_t tensor, int64_t count, int64_t role) {
  Rounder rounder;
  if (rounding.mode == PYSTEEP_NEAREST || (dtype != PYSTEEP_FLOAT16 && dtype != PYSTEEP_BFLOAT16)) return rounder;
  rounder.mode = rounding.mode;
  if (rounding.mode == PYSTEEP_COMPENSATED) {
    rounder.compensation = static_cast<int16_t*>(rounding.compensation[role * count + tensor]);
  } else {
    rounder.seed = rounding.seed;
    rounder.step = uint32_t(int64_t(read(rounding.step)));
    rounder.stream = rounding.stream[tensor];
    rounder.role = uint32_t(role);
    rounder.first = rounding.first[tensor];
  }
  return rounder;
}

// As many counters as one vector of the build holds.
#if defined(__AVX512F__)
using Lanes = uint64_t __attribute__((vector_size(64)));
#elif defined(__AVX2__)
using Lanes = uint64_t __attribute__((vector_size(32)));
#else
using Lanes = uint64_t __attribute__((vector_size(16)));
#endif

template <>
struct Product<Lanes> {
  static PYSTEEP_INLINE Lanes of(Lanes words, uint32_t factor) {
// One instruction, which GCC does not find by itself; of the form without a mask it warns.
#if defined(__AVX512F__)
    return Lanes(_mm512_maskz_mul_epu32(0xff, __m512i(words), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
    return Lanes(_mm256_mul_epu32(__m256i(words), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
    return Lanes(_mm_mul_epu32(__m128i(words), _mm_set1_epi64x(factor)));
#else
    return (words & uint64_t(0xffffffff)) * uint64_t(factor);
#endif
  }
};

// The numbers of the pairs of eights from `Pair` on, of each the first four in a and the others in b: these, and inverted.
template <int Pair>
PYSTEEP_INLINE void store_pairs(Lanes a, Lanes b, uint16_t* to) {
#if defined(__AVX512F__)
  const Lanes twice = __builtin_shufflevector(a, b, Pair, Pair + 8, Pair, Pair + 8, Pair + 1, Pair + 9, Pair + 1, Pair + 9);
  const Lanes numbers = twice ^ Lanes{0, 0, ~uint64_t(0), ~uint64_t(0), 0, 0, ~uint64_t(0), ~uint64_t(0)};
  std::memcpy(to + 16 * Pair, &numbers, sizeof(numbers));
  if constexpr (Pair + 2 < 8) store_pairs<Pair + 2>(a, b, to);
#elif defined(__AVX2__)
  const Lanes numbers =
      __builtin_shufflevector(a, b, Pair, Pair + 4, Pair, Pair + 4) ^ Lanes { 0, 0, ~uint64_t(0), ~uint64_t(0) };
  std::memcpy(to + 16 * Pair, &numbers, sizeof(numbers));
  if constexpr (Pair + 1 < 4) store_pairs<Pair + 1>(a, b, to);
#else
  const Lanes numbers = __builtin_shufflevector(a, b, Pair, Pair + 2), inverted = ~numbers;
  std::memcpy(to + 16 * Pair, &numbers, sizeof(numbers));
  std::memcpy(to + 16 * Pair + 8, &inverted, sizeof(inverted));
  if constexpr (Pair + 1 < 2) store_pairs<Pair + 1>(a, b, to);
#endif
}

// The random numbers below 2^16 of the elements from `first` on, of which n are wanted.
class Noise {
 public:
  Noise(const Rounder& rounder, int64_t first, int64_t n) : skipped_(first & 15) {
    static_assert(std::endian::native == std::endian::little, "the lower 16 bits of a word come first");
    constexpr uint64_t word = 0xffffffff;
    const int64_t pairs = (skipped_ + n + 15) / 16;
    Lanes pair;
    for (int64_t i = 0; i < lanes; ++i) pair[i] = (uint64_t(first) >> 4) + uint64_t(i);
    for (int64_t i = 0; i < pairs; i += lanes, pair += lanes) {
      const Words<Lanes> words = rounding_noise(pair, rounder.role, rounder.step, rounder.stream, rounder.seed);
      const Lanes front = (words.of[0] & word) | words.of[1] << 32, back = (words.of[2] & word) | words.of[3] << 32;
      store_pairs<0>(front, back, numbers_ + 16 * i);
    }
  }

  const uint16_t* numbers() const { return numbers_ + skipped_; }

 private:
  static constexpr int64_t lanes = sizeof(Lanes) / sizeof(uint64_t);
  static constexpr int64_t most_pairs = block_elements / 16 + lanes;
  alignas(64) uint16_t numbers_[16 * most_pairs];
  int64_t skipped_;  // elements of the first pair of eights
};

template <typename Storage>
void round_block(const float* __restrict from, const uint16_t* __restrict noise, int64_t n, Storage* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) round_stochastically(from[i], noise[i], to[i]);
}

template <typename Storage>
void split_block(const float* __restrict from, int64_t n, Storage* __restrict to, int16_t* __restrict compensation) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) round_compensated(from[i], to[i], compensation[i]);
}

template <typename Storage>
void join_block(const Storage* __restrict from, const int16_t* __restrict compensation, int64_t n, float* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widen_compensated(from[i], compensation[i]);
}

// A block of weights or factors.
template <typename T>
class RoundedBlock : public Block<T> {
 public:
  RoundedBlock(void* base, pysteep_dtype dtype, int64_t begin, int64_t n, const Rounder& rounder)
      : Block<T>(base, dtype, begin, n), rounder_(rounder), begin_(begin) {
    if constexpr (sizeof(T) == sizeof(float))
      if (rounder_.mode == PYSTEEP_COMPENSATED) read_compensated();
  }

  // Afterwards data() holds what is stored, with its compensation.
  void write_back(bool and_read_again = false) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rounder_.mode == PYSTEEP_STOCHASTIC) {
        const Noise noise(rounder_, rounder_.first + begin_, this->n_);
        this->dtype_ == PYSTEEP_FLOAT16 ? round_block(this->copy_, noise.numbers(), this->n_, memory<float16>())
                                        : round_block(this->copy_, noise.numbers(), this->n_, memory<bfloat16>());
        if (and_read_again) this->read();
        return;
      }
      if (rounder_.mode == PYSTEEP_COMPENSATED) {
        this->dtype_ == PYSTEEP_FLOAT16 ? split_block(this->copy_, this->n_, memory<float16>(), compensation())
                                        : split_block(this->copy_, this->n_, memory<bfloat16>(), compensation());
        if (and_read_again) read_compensated();
        return;
      }
    }
    Block<T>::write_back(and_read_again);
  }

 private:
  template <typename Storage>
  Storage* memory() const {
    return static_cast<Storage*>(this->memory_);
  }
  int16_t* compensation() const { return rounder_.compensation + begin_; }
  void read_compensated() {
    this->dtype_ == PYSTEEP_FLOAT16 ? join_block(memory<float16>(), compensation(), this->n_, this->copy_)
                                    : join_block(memory<bfloat16>(), compensation(), this->n_, this->copy_);
  }

  Rounder rounder_;
  int64_t begin_;
};

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
