// The C interface of the CPU ops: each calls the build of its kernel for the instruction set that serves.
#include <cstddef>
#include <vector>

#include "cpu/isa.h"
#include "pysteep/diagonal_flow.h"
#include "pysteep/factor_product.h"
#include "pysteep/factor_step.h"
#include "pysteep/mirror_step.h"
#include "pysteep/sign_vote.h"
#include "pysteep/steepest_step.h"

namespace pysteep {
using Options = pysteep_steepest_options;
using Rounding = pysteep_rounding;

PYSTEEP_ISA_KERNEL(void, steepest_step_cpu, (const pysteep_steepest_tensors&, const Options&, const Rounding&))
PYSTEEP_ISA_KERNEL(int64_t, steepest_power_chunks, (const pysteep_steepest_tensors&))
PYSTEEP_ISA_KERNEL(double, steepest_power_cpu,
                   (const pysteep_steepest_tensors&, const Options&, const Rounding&, double* chunk_sums))
PYSTEEP_ISA_KERNEL(void, factor_product_cpu, (const pysteep_product_tensors&))
PYSTEEP_ISA_KERNEL(void, factor_product_backward_cpu, (const pysteep_product_tensors&))
PYSTEEP_ISA_KERNEL(void, factor_product_double_backward_cpu, (const pysteep_product_tensors&))
PYSTEEP_ISA_KERNEL(void, factor_step_cpu, (const pysteep_factor_tensors&, const Options&, const Rounding&))
PYSTEEP_ISA_KERNEL(int, diagonal_flow_cpu, (const pysteep_diagonal_flows&, int64_t begin, int64_t end))
PYSTEEP_ISA_KERNEL(void, mirror_step_cpu, (const pysteep_mirror_tensors&, const Options&, const Rounding&))
PYSTEEP_ISA_KERNEL(void, pack_signs_cpu, (const pysteep_votes&, int64_t phase))
PYSTEEP_ISA_KERNEL(void, count_votes_cpu, (const pysteep_votes&))

}  // namespace pysteep

extern "C" {

int pysteep_steepest_step_cpu(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                              const pysteep_rounding* rounding) {
  PYSTEEP_SELECT(steepest_step_cpu)(*tensors, *options, *rounding);
  return 0;
}

int pysteep_steepest_power_sum_cpu(const pysteep_steepest_tensors* tensors, const pysteep_steepest_options* options,
                                   const pysteep_rounding* rounding, double* sum) {
  // A sum for each chunk, added up in halves: the same bits for any number of threads and any instruction set.
  std::vector<double> chunk_sums(static_cast<std::size_t>(PYSTEEP_SELECT(steepest_power_chunks)(*tensors)), 0.0);
  *sum = PYSTEEP_SELECT(steepest_power_cpu)(*tensors, *options, *rounding, chunk_sums.data());
  return 0;
}

int pysteep_diagonal_flow_cpu(const pysteep_diagonal_flows* flows, int64_t begin, int64_t end) {
  return PYSTEEP_SELECT(diagonal_flow_cpu)(*flows, begin, end);
}

int pysteep_factor_product_cpu(const pysteep_product_tensors* tensors) {
  PYSTEEP_SELECT(factor_product_cpu)(*tensors);
  return 0;
}

int pysteep_factor_product_backward_cpu(const pysteep_product_tensors* tensors) {
  PYSTEEP_SELECT(factor_product_backward_cpu)(*tensors);
  return 0;
}

int pysteep_factor_product_double_backward_cpu(const pysteep_product_tensors* tensors) {
  PYSTEEP_SELECT(factor_product_double_backward_cpu)(*tensors);
  return 0;
}

int pysteep_factor_step_cpu(const pysteep_factor_tensors* tensors, const pysteep_steepest_options* options,
                            const pysteep_rounding* rounding) {
  PYSTEEP_SELECT(factor_step_cpu)(*tensors, *options, *rounding);
  return 0;
}

int pysteep_mirror_step_cpu(const pysteep_mirror_tensors* tensors, const pysteep_steepest_options* options,
                            const pysteep_rounding* rounding) {
  PYSTEEP_SELECT(mirror_step_cpu)(*tensors, *options, *rounding);
  return 0;
}

int pysteep_pack_signs_cpu(const pysteep_votes* votes, int64_t phase) {
  PYSTEEP_SELECT(pack_signs_cpu)(*votes, phase);
  return 0;
}

int pysteep_count_votes_cpu(const pysteep_votes* votes) {
  PYSTEEP_SELECT(count_votes_cpu)(*votes);
  return 0;
}

}  // extern "C"
