// A block of a tensor in its compute type: the tensor's own memory where it already is, else a converted copy.
#pragma once

#include "math/dtype.h"
#include "pysteep/tensors.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

constexpr int64_t block_elements = 512;  // the copies of a few operands stay in the first-level cache

template <typename T>
constexpr pysteep_dtype dtype_of() {
  return sizeof(T) == sizeof(double) ? PYSTEEP_FLOAT64 : PYSTEEP_FLOAT32;
}

template <typename Storage, typename T>
void widen_block(const void* from, int64_t n, T* to) {
  const Storage* source = static_cast<const Storage*>(from);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = T(widen(source[i]));
}

template <typename Storage, typename T>
void narrow_block(const T* from, int64_t n, void* to) {
  Storage* target = static_cast<Storage*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(from[i], target[i]);
}

inline int64_t bytes_of(pysteep_dtype dtype) { return dtype == PYSTEEP_FLOAT64 ? 8 : dtype == PYSTEEP_FLOAT32 ? 4 : 2; }

template <typename T>
class Block {
 public:
  Block(void* base, pysteep_dtype dtype, int64_t begin, int64_t n)
      : memory_(static_cast<char*>(base) + begin * bytes_of(dtype)), dtype_(dtype), n_(n) {
    if (in_place()) return;
    if (dtype_ == PYSTEEP_FLOAT16) widen_block<float16>(memory_, n_, copy_);
    if (dtype_ == PYSTEEP_BFLOAT16) widen_block<bfloat16>(memory_, n_, copy_);
    if (dtype_ == PYSTEEP_FLOAT32) widen_block<float>(memory_, n_, copy_);
    if (dtype_ == PYSTEEP_FLOAT64) widen_block<double>(memory_, n_, copy_);
  }

  T* data() { return in_place() ? static_cast<T*>(memory_) : copy_; }

  void write_back() const {
    if (in_place()) return;
    if (dtype_ == PYSTEEP_FLOAT16) narrow_block<float16>(copy_, n_, memory_);
    if (dtype_ == PYSTEEP_BFLOAT16) narrow_block<bfloat16>(copy_, n_, memory_);
    if (dtype_ == PYSTEEP_FLOAT32) narrow_block<float>(copy_, n_, memory_);
    if (dtype_ == PYSTEEP_FLOAT64) narrow_block<double>(copy_, n_, memory_);
  }

 private:
  bool in_place() const { return dtype_ == dtype_of<T>(); }

  void* memory_;
  pysteep_dtype dtype_;
  int64_t n_;
  alignas(64) T copy_[block_elements];
};

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
