// Storage types and their compute types: 16- and 32-bit floats compute in float, 64-bit ones in double.
// Rounding to 16 bits is to nearest, ties to even; subnormals, infinities and NaN are kept.
#pragma once

#include "math/portable.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pysteep {
inline namespace PYSTEEP_ISA {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <typename Storage>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <typename Storage>
using compute_t = typename compute_type<Storage>::type;

PYSTEEP_INLINE float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  constexpr uint32_t rebias = uint32_t(127 - 15) << 23;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t normal = magnitude + rebias;
  const uint32_t special = normal + rebias;  // infinity and NaN
  // The mantissa of a subnormal is read as a fraction above 2^-14, then 2^-14 is taken away: exact, no subnormal operand.
  const float smallest_normal = bit_cast<float>(uint32_t(127 - 14) << 23);
  const float subnormal = bit_cast<float>(magnitude + (uint32_t(127 - 14) << 23)) - smallest_normal;
  uint32_t bits = magnitude >= (0x7c00u << 13) ? special : normal;
  bits = magnitude < (0x0400u << 13) ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
#endif
}

PYSTEEP_INLINE float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
PYSTEEP_INLINE float widen(float x) { return x; }
PYSTEEP_INLINE double widen(double x) { return x; }

PYSTEEP_INLINE void narrow(float x, float16& result) {
#if defined(__CUDA_ARCH__)
  result.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (uint32_t(127 - 15) << 23) + 0xfffu + odd) >> 13;
  // Adding 1/2 leaves the subnormal's mantissa, correctly rounded, in the low bits of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < (uint32_t(127 - 14) << 23) ? subnormal : normal;
  half = magnitude >= (uint32_t(127 + 16) << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  result.bits = uint16_t(half | (bits >> 16 & 0x8000u));
#endif
}

PYSTEEP_INLINE void narrow(float x, bfloat16& result) {
#if defined(__CUDA_ARCH__)
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  result.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
#endif
}

PYSTEEP_INLINE void narrow(double x, float16& result) { narrow(float(x), result); }
PYSTEEP_INLINE void narrow(double x, bfloat16& result) { narrow(float(x), result); }
PYSTEEP_INLINE void narrow(float x, float& result) { result = x; }
PYSTEEP_INLINE void narrow(double x, float& result) { result = float(x); }
PYSTEEP_INLINE void narrow(double x, double& result) { result = x; }

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
