// Blocks of 16-bit numbers, rounded as a call asks for. The arithmetic is in math/rounding.h.
#pragma once

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

// Noise for the elements from `first` on, of which n are wanted.
struct Noise {
  static constexpr int64_t most_blocks = block_elements / 8 + 1;
  alignas(64) uint32_t words[4 * most_blocks];
  int64_t skipped;  // elements of the first block of eight

  Noise(const Rounder& rounder, int64_t first, int64_t n) : skipped(first & 7) {
    const int64_t blocks = (skipped + n + 7) / 8;
    const uint64_t start = uint64_t(first) >> 3, seed = rounder.seed;
    const uint32_t step = rounder.step, stream = rounder.stream, role = rounder.role;
    uint32_t* const target = words;
#pragma omp simd
    for (int64_t i = 0; i < blocks; ++i) {
      const Words noise = rounding_noise(start + uint64_t(i), role, step, stream, seed);
      target[4 * i] = noise.of[0];
      target[4 * i + 1] = noise.of[1];
      target[4 * i + 2] = noise.of[2];
      target[4 * i + 3] = noise.of[3];
    }
  }
};

template <typename Storage>
void round_block(const float* __restrict from, const Noise& noise, int64_t n, Storage* __restrict to) {
  alignas(64) uint16_t numbers[8 * Noise::most_blocks];
  const uint32_t* const words = noise.words;
#pragma omp simd
  for (int64_t i = 0; i < 4 * Noise::most_blocks; ++i) {
    numbers[2 * i] = uint16_t(words[i]);
    numbers[2 * i + 1] = uint16_t(words[i] >> 16);
  }
  const uint16_t* const own = numbers + noise.skipped;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) round_stochastically(from[i], own[i], to[i]);
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
        this->dtype_ == PYSTEEP_FLOAT16 ? round_block(this->copy_, noise, this->n_, memory<float16>())
                                        : round_block(this->copy_, noise, this->n_, memory<bfloat16>());
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
