// One parallel loop over the elements of all tensors of a call.
#pragma once

#include <omp.h>

#include <cstdint>

#include "cpu/float_mode.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

constexpr int64_t chunk_elements = 16384;
constexpr int64_t serial_elements = 32768;  // fewer than this in all: starting the threads costs more than the work

inline int64_t chunks_of(int64_t elements) { return (elements + chunk_elements - 1) / chunk_elements; }

// Calls work(tensor, begin, end, chunk) for every chunk [begin, end) of every tensor. Chunks are numbered the same way
// whatever the number of threads; a thread takes those that begin in its share of the elements, in the caller's floating-point
// mode.
template <typename Work>
void for_each_chunk(const int64_t* numel, int64_t count, const Work& work) {
  int64_t total = 0;
  for (int64_t tensor = 0; tensor < count; ++tensor) total += numel[tensor];
  const FloatMode callers = float_mode();
#pragma omp parallel if (total >= serial_elements)
  {
    const InFloatMode mode(callers);
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t low = total / threads * thread + total % threads * thread / threads;
    const int64_t high = total / threads * (thread + 1) + total % threads * (thread + 1) / threads;
    int64_t first = 0, first_chunk = 0;  // of the current tensor
    for (int64_t tensor = 0; tensor < count && first < high; ++tensor) {
      const int64_t elements = numel[tensor];
      const int64_t skipped = low > first ? chunks_of(low - first) : 0;
      for (int64_t chunk = skipped, begin = skipped * chunk_elements; begin < elements && first + begin < high;
           ++chunk, begin += chunk_elements) {
        const int64_t end = begin + chunk_elements < elements ? begin + chunk_elements : elements;
        work(tensor, begin, end, first_chunk + chunk);
      }
      first += elements;
      first_chunk += chunks_of(elements);
    }
  }
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
