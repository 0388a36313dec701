// Large pages for memory that an op is about to write for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pysteep {
inline namespace PYSTEEP_ISA {

constexpr int64_t huge_page = int64_t(1) << 21;

// The system supplies fresh memory page by page, which takes longer than filling it: 13 ms for 48 MB in pages of 4 KiB, 2 ms in
// pages of 2 MiB. Advice only: where the system does not follow it, nothing changes.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t first = (reinterpret_cast<intptr_t>(memory) + huge_page - 1) / huge_page * huge_page;
  const int64_t last = (reinterpret_cast<intptr_t>(memory) + bytes) / huge_page * huge_page;
  if (first < last) madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#endif
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
