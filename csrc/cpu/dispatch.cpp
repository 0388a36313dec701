// The C interface of the CPU ops: each calls the build of its kernel for the instruction set that serves.
#include <cstddef>
#include <vector>

#include "cpu/isa.h"
#include "pysteep/steepest_step.h"

namespace pysteep {
using Tensors = pysteep_steepest_tensors;
using Options = pysteep_steepest_options;

PYSTEEP_ISA_KERNEL(void, steepest_step_cpu, (const Tensors&, const Options&))
PYSTEEP_ISA_KERNEL(int64_t, steepest_power_chunks, (const Tensors&))
PYSTEEP_ISA_KERNEL(void, steepest_power_cpu, (const Tensors&, const Options&, double* chunk_sums))

}  // namespace pysteep

extern "C" {

int pysteep_steepest_step_cpu(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options) {
  PYSTEEP_SELECT(steepest_step_cpu)(*tensors, *options);
  return 0;
}

int pysteep_steepest_power_sum_cpu(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                   double* sum) {
  // A sum per chunk, added up in order: the same bits whatever the number of threads.
  std::vector<double> chunk_sums(static_cast<std::size_t>(PYSTEEP_SELECT(steepest_power_chunks)(*tensors)), 0.0);
  PYSTEEP_SELECT(steepest_power_cpu)(*tensors, *options, chunk_sums.data());
  *sum = 0;
  for (double chunk_sum : chunk_sums) *sum += chunk_sum;
  return 0;
}

}  // extern "C"
