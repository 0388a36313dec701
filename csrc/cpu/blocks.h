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

inline int64_t bytes_of(pysteep_dtype dtype) { return dtype == PYSTEEP_FLOAT64 ? 8 : dtype == PYSTEEP_FLOAT32 ? 4 : 2; }

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

template <typename T>
void widen_block(pysteep_dtype dtype, const void* from, int64_t n, T* to) {
  if (dtype == PYSTEEP_FLOAT16) widen_block<float16>(from, n, to);
  if (dtype == PYSTEEP_BFLOAT16) widen_block<bfloat16>(from, n, to);
  if (dtype == PYSTEEP_FLOAT32) widen_block<float>(from, n, to);
  if (dtype == PYSTEEP_FLOAT64) widen_block<double>(from, n, to);
}

template <typename T>
void narrow_block(pysteep_dtype dtype, const T* from, int64_t n, void* to) {
  if (dtype == PYSTEEP_FLOAT16) narrow_block<float16>(from, n, to);
  if (dtype == PYSTEEP_BFLOAT16) narrow_block<bfloat16>(from, n, to);
  if (dtype == PYSTEEP_FLOAT32) narrow_block<float>(from, n, to);
  if (dtype == PYSTEEP_FLOAT64) narrow_block<double>(from, n, to);
}

// Fetches the lines of the elements [begin, begin + n) for when their turn comes; they may lie past the end of a tensor.
inline void prefetch_block(const void* base, pysteep_dtype dtype, int64_t begin, int64_t n) {
  const char* first = static_cast<const char*>(base) + begin * bytes_of(dtype);
  for (int64_t at = 0; at < n * bytes_of(dtype); at += 64) __builtin_prefetch(first + at);
}

template <typename T>
class Block {
 public:
  Block(void* base, pysteep_dtype dtype, int64_t begin, int64_t n)
      : memory_(static_cast<char*>(base) + begin * bytes_of(dtype)), dtype_(dtype), n_(n) {
    read();
  }
  Block(const void* base, pysteep_dtype dtype, int64_t begin, int64_t n) : Block(const_cast<void*>(base), dtype, begin, n) {}

  T* data() { return in_place() ? static_cast<T*>(memory_) : copy_; }

  // Afterwards data() holds what is stored.
  void write_back(bool and_read_again = false) {
    if (in_place()) return;
    narrow_block(dtype_, copy_, n_, memory_);
    if (and_read_again) read();
  }

 protected:
  bool in_place() const { return dtype_ == dtype_of<T>(); }
  void read() {
    if (!in_place()) widen_block(dtype_, memory_, n_, copy_);
  }

  void* memory_;
  pysteep_dtype dtype_;
  int64_t n_;
  alignas(64) T copy_[block_elements];
};

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
