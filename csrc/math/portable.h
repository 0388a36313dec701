// What lets one scalar function compile for every instruction set and for the GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "every operation is rounded on its own: build without -ffast-math and its parts"
#endif

#if defined(__CUDACC__)
#define PYSTEEP_INLINE __host__ __device__ __forceinline__
#else
#define PYSTEEP_INLINE inline __attribute__((always_inline))
#endif

// Each instruction set is its own build of the same source. Distinct names keep the linker from merging, say, the
// AVX-512 body of an inline function into the build that must run on any machine.
#ifndef PYSTEEP_ISA
#define PYSTEEP_ISA portable
#endif

namespace pysteep {
inline namespace PYSTEEP_ISA {

template <typename To, typename From>
PYSTEEP_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
