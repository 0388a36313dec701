#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace pysteep {
namespace {

constexpr Isa all[] = {Isa::avx512, Isa::avx2, Isa::baseline};  // best first

Isa best() {
  for (Isa candidate : all)
    if (isa_runs_here(candidate)) return candidate;
  return Isa::baseline;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return selected().load(std::memory_order_relaxed); }

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool isa_runs_here(Isa value) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (value == Isa::avx512)
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (value == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return value == Isa::baseline;
}

bool select_isa(const char* name) {
  for (Isa candidate : all) {
    if (std::strcmp(name, isa_name(candidate)) != 0 || !isa_runs_here(candidate)) continue;
    selected().store(candidate, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace pysteep
