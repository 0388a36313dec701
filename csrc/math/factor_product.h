// The arithmetic of factor_product and its two derivatives. Formulas: include/pysteep/factor_product.h.
#pragma once

#include "math/dtype.h"
#include "math/portable.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

// A number and its tangent. Their product is the product rule.
template <typename T>
struct Dual {
  T value, tangent;
};

template <typename T>
PYSTEEP_INLINE Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}

// dw_i from head = dx w_1 ... w_{i-1} and tail = w_{i+1} ... w_L.
template <typename T>
PYSTEEP_INLINE T factor_gradient(T head, T tail) {
  return head * tail;
}

// The gradient of sum_i v_i dw_i with respect to w_i; head and tail are products of (w, v), without dx.
template <typename T>
PYSTEEP_INLINE T factor_second_gradient(T gradient, Dual<T> head, Dual<T> tail) {
  return gradient * (head.tangent * tail.value + head.value * tail.tangent);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
