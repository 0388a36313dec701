// How a thread rounds, and whether it flushes subnormal numbers to zero: a register of each thread.
#pragma once

#include <cstdint>

#include "math/portable.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace pysteep {
inline namespace PYSTEEP_ISA {

#if defined(__x86_64__) || defined(_M_X64)
using FloatMode = uint32_t;
PYSTEEP_INLINE FloatMode float_mode() { return _mm_getcsr(); }
PYSTEEP_INLINE void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
PYSTEEP_INLINE FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
  return mode;
}
PYSTEEP_INLINE void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
using FloatMode = int;
PYSTEEP_INLINE FloatMode float_mode() { return 0; }
PYSTEEP_INLINE void set_float_mode(FloatMode) {}
#endif

// This thread works in the mode of another, and has its own again afterwards.
class InFloatMode {
 public:
  explicit InFloatMode(FloatMode mode) : own_(float_mode()) { set_float_mode(mode); }
  ~InFloatMode() { set_float_mode(own_); }
  InFloatMode(const InFloatMode&) = delete;
  InFloatMode& operator=(const InFloatMode&) = delete;

 private:
  FloatMode own_;
};

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
