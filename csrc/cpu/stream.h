// Results that nobody reads soon go past the caches: a cached store would first read the memory that it overwrites.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

constexpr int64_t streamed_elements = int64_t(1) << 20;  // of all tensors of a call; fewer may still be in a cache when read

#if defined(__AVX512F__)
inline void stream_line(const char* from, char* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
inline void stream_line(const char* from, char* to) {
  for (int at = 0; at < 64; at += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
}
#elif defined(__SSE2__)
inline void stream_line(const char* from, char* to) {
  for (int at = 0; at < 64; at += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
}
#else
inline void stream_line(const char* from, char* to) { std::memcpy(to, from, 64); }
#endif

inline void stream_bytes(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t head = -reinterpret_cast<intptr_t>(target) & 63;
  int64_t at = head < bytes ? head : bytes;
  std::memcpy(target, source, size_t(at));
  for (; at + 64 <= bytes; at += 64) stream_line(source + at, target + at);
  std::memcpy(target + at, source + at, size_t(bytes - at));
}

// Other threads see what was streamed once the thread that did so has called this.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The elements [begin, begin + n) of a tensor from a block of the compute type.
template <typename T>
void store_block(const T* from, void* base, pysteep_dtype dtype, int64_t begin, int64_t n, bool streams) {
  void* target = static_cast<char*>(base) + begin * bytes_of(dtype);
  if (!streams) return narrow_block(dtype, from, n, target);
  if (dtype == dtype_of<T>()) return stream_bytes(from, target, n * bytes_of(dtype));
  alignas(64) char narrowed[block_elements * sizeof(T)];
  narrow_block(dtype, from, n, narrowed);
  stream_bytes(narrowed, target, n * bytes_of(dtype));
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
