// u(c) = sign(c) |c|^(q-1), the direction of steepest descent in L_p, 1/p + 1/q = 1.   [Eq. 3]
// u(+-0) = +-0 for every q, NaN stays NaN, and at q = 1 u(+-inf) = +-1.
#pragma once

#include <math.h>

#include "math/portable.h"
#include "math/power_coefficients.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

enum class Power { sign, root, identity, general };  // q = 1, 1.5, 2, any other in [1, 2]

PYSTEEP_INLINE Power power_of(double q) {
  if (q == 1.0) return Power::sign;
  if (q == 1.5) return Power::root;
  if (q == 2.0) return Power::identity;
  return Power::general;
}

template <typename T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static constexpr int mantissa = 23, exponent_fraction = 16;
  static constexpr Int mantissa_mask = 0x007fffff, root_half = 0x3f3504f3, smallest_normal = 0x00800000, infinity = 0x7f800000;
  static constexpr Int lift = 24;  // 2^24 times a subnormal is normal
  static PYSTEEP_INLINE constexpr float unlift() { return 0x1p-24f; }
  static PYSTEEP_INLINE constexpr float round() {
    return 0x1.8p23f;
  }  // a sum with it holds the nearest integer in its low bits
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  using Unsigned = uint64_t;
  static constexpr int mantissa = 52, exponent_fraction = 40;
  static constexpr Int mantissa_mask = 0x000fffffffffffff, root_half = 0x3fe6a09e667f3bcd, smallest_normal = 0x0010000000000000,
                       infinity = 0x7ff0000000000000;
  static constexpr Int lift = 53;
  static PYSTEEP_INLINE constexpr double unlift() { return 0x1p-53; }
  static PYSTEEP_INLINE constexpr double round() { return 0x1.8p52; }
};

// q - 1 as the polynomial wants it: `high` times an integer exponent of T is exact, high + low = q - 1 to far below an ulp.
template <typename T>
struct PowerExponent {
  T full, high, low;

  static PYSTEEP_INLINE PowerExponent of(double exponent) {
    const double unit = double(int64_t(1) << FloatBits<T>::exponent_fraction);
    const double high = ::rint(exponent * unit) / unit;
    return {T(exponent), T(high), T(exponent - high)};
  }
};

// a b + c, fused where the hardware does it: within the 4 ulp that `power` promises, not a part of the contract's arithmetic.
template <typename T>
PYSTEEP_INLINE T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return sizeof(T) == sizeof(float) ? T(__builtin_fmaf(float(a), float(b), float(c))) : T(__builtin_fma(a, b, c));
#else
  return a * b + c;
#endif
}

// Horner's rule; a recursion, because compilers vectorise the loop around it only once no loop is left inside.
template <typename Coefficients, int First = 0, typename T>
PYSTEEP_INLINE T polynomial(T x) {
  constexpr T coefficient = Coefficients::value[First];
  if constexpr (First + 1 == Coefficients::count)
    return coefficient;
  else
    return multiply_add(polynomial<Coefficients, First + 1>(x), x, coefficient);
}

// log2 |c| = whole + fraction, |fraction| <= 1/2.
template <typename T>
struct Logarithm {
  T whole, fraction;
};

template <typename T>
PYSTEEP_INLINE T magnitude(T c) {
  using Int = typename FloatBits<T>::Int;
  return bit_cast<T>(bit_cast<Int>(c) & ~bit_cast<Int>(T(-0.0)));
}

// Which c a caller passes. `normal`: zeros and normal finite numbers, as almost every block of a gradient holds; who has
// checked a block by its Extent saves a fifth of the operations at general q. The results are the same.
enum class Range { any, normal };

template <typename T>
struct Extent {
  using Unsigned = typename FloatBits<T>::Unsigned;
  Unsigned largest = 0, smallest = ~Unsigned(0);  // magnitudes as integers, less 1 in `smallest`: 0 is then larger than any

  static PYSTEEP_INLINE Unsigned size(T c) { return bit_cast<Unsigned>(magnitude(c)); }
  PYSTEEP_INLINE bool is_normal() const {
    return largest < Unsigned(FloatBits<T>::infinity) && smallest >= Unsigned(FloatBits<T>::smallest_normal - 1);
  }
};

// |c|^e for 0 < e < 1 is 2^(e log2|c|), within 4 ulp: the whole part of the logarithm is multiplied by e without error, so the
// error does not grow with |log2|c||. No table and no branch, so that both halves vectorise anywhere.
template <Power P, Range R = Range::any, typename T>
PYSTEEP_INLINE Logarithm<T> logarithm(T c) {
  if constexpr (P != Power::general) {
    return {};
  } else {
    using Bits = FloatBits<T>;
    using Int = typename Bits::Int;
    Int size = bit_cast<Int>(magnitude(c));
    Int lift = 0;
    if (R == Range::any) {
      const bool subnormal = size < Bits::smallest_normal;
      // Read the mantissa of a subnormal as a fraction above a power of two, then take that power away: exact.
      constexpr Int above = (Bits::lift + 1) << Bits::mantissa;
      size = subnormal ? bit_cast<Int>(bit_cast<T>(size + above) - bit_cast<T>(above)) : size;
      lift = subnormal ? Bits::lift : 0;
    }
    const Int bits = size - Bits::root_half;
    const T r = bit_cast<T>((bits & Bits::mantissa_mask) + Bits::root_half) - T(1);
    const Int whole = (bits >> Bits::mantissa) - lift;
    return {bit_cast<T>(whole + bit_cast<Int>(Bits::round())) - Bits::round(), r * polynomial<Log2Coefficients<T>>(r)};
  }
}

template <Range R, typename T>
PYSTEEP_INLINE T power(T size, Logarithm<T> log, const PowerExponent<T>& exponent) {
  using Bits = FloatBits<T>;
  using Int = typename Bits::Int;
  const T low = multiply_add(exponent.low, log.whole, exponent.full * log.fraction);
  const T rounded = multiply_add(exponent.high, log.whole, low) + Bits::round();
  const T f = multiply_add(exponent.high, log.whole, Bits::round() - rounded) + low;
  const Int mantissa = bit_cast<Int>(multiply_add(f, polynomial<Exp2Coefficients<T>>(f), T(1)));
  // The nearest integer, in the low bits of `rounded`, goes straight into the exponent. Only a subnormal |c| may have a
  // subnormal power: there in two factors.
  const Int n = bit_cast<Int>(rounded);
  if (R == Range::normal) return bit_cast<T>(mantissa + (n << Bits::mantissa));
  const bool subnormal = bit_cast<Int>(size) < Bits::smallest_normal;
  const T lifted = bit_cast<T>(mantissa + ((n + (subnormal ? Bits::lift : 0)) << Bits::mantissa));
  return lifted * (subnormal ? Bits::unlift() : T(1));
}

PYSTEEP_INLINE float square_root(float x) { return ::sqrtf(x); }
PYSTEEP_INLINE double square_root(double x) { return ::sqrt(x); }

// `log` is logarithm<P, R>(c).
template <Power P, Range R = Range::any, typename T>
PYSTEEP_INLINE T signed_power(T c, Logarithm<T> log, const PowerExponent<T>& exponent) {
  if constexpr (P == Power::identity) {
    return c;
  } else {
    using Bits = FloatBits<T>;
    using Int = typename Bits::Int;
    const T size = magnitude(c);
    T u = T(1);
    if constexpr (P == Power::root) u = square_root(size);
    if constexpr (P == Power::general) u = power<R>(size, log, exponent);
    // Zero and NaN, and for q > 1 an infinity, are their own image.
    const Int last = P == Power::sign ? Bits::infinity : Bits::infinity - 1;
    const bool regular = bit_cast<Int>(size) != 0 && (R == Range::normal || bit_cast<Int>(size) <= last);
    return regular ? bit_cast<T>(bit_cast<Int>(u) | (bit_cast<Int>(c) ^ bit_cast<Int>(size))) : c;
  }
}

// The power chosen at run time.
template <typename T>
PYSTEEP_INLINE T signed_power(Power power, T c, const PowerExponent<T>& exponent) {
  if (power == Power::identity) return c;
  if (power == Power::sign) return signed_power<Power::sign>(c, {}, exponent);
  if (power == Power::root) return signed_power<Power::root>(c, {}, exponent);
  return signed_power<Power::general>(c, logarithm<Power::general>(c), exponent);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
