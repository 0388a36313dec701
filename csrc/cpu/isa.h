// Every CPU op is built once per instruction set; the best one that the machine runs is picked when the module loads.
#pragma once

namespace pysteep {

enum class Isa { baseline, avx2, avx512 };

Isa isa();
const char* isa_name(Isa);
bool isa_runs_here(Isa);
// For tests: serve from another build. False, and no change, when the machine or this platform's build lacks it.
bool select_isa(const char* name);

// A kernel declared with PYSTEEP_ISA_KERNEL(returned, kernel, parameters) has a build in every pysteep::<isa>;
// PYSTEEP_SELECT(kernel) is the one that serves.
#if defined(__x86_64__) || defined(_M_X64)
#define PYSTEEP_ISA_KERNEL(returned, kernel, parameters) \
  namespace avx512 {                                     \
  returned kernel parameters;                            \
  }                                                      \
  namespace avx2 {                                       \
  returned kernel parameters;                            \
  }                                                      \
  namespace baseline {                                   \
  returned kernel parameters;                            \
  }
#define PYSTEEP_SELECT(kernel)                                      \
  (pysteep::isa() == pysteep::Isa::avx512 ? pysteep::avx512::kernel \
   : pysteep::isa() == pysteep::Isa::avx2 ? pysteep::avx2::kernel   \
                                          : pysteep::baseline::kernel)
#else
#define PYSTEEP_ISA_KERNEL(returned, kernel, parameters) \
  namespace baseline {                                   \
  returned kernel parameters;                            \
  }
#define PYSTEEP_SELECT(kernel) pysteep::baseline::kernel
#endif

}  // namespace pysteep
