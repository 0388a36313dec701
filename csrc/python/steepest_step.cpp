// steepest_step as Python calls it. The interface is pysteep/steepest_step.h.
#include "pysteep/steepest_step.h"

#include <numeric>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"
#include "python/steps.h"

namespace pysteep {
namespace {

pysteep_steepest_tensors view(const Tensors& tensors, const RoundingView& rounding) {
  check_steepest(tensors);
  const Role &weight = tensors.roles[0], &gradient = tensors.roles[1];
  const bool has_momentum = rounding.uncompensated > 2;
  const Role momentum = has_momentum ? tensors.roles[2] : Role{};
  return {static_cast<int64_t>(tensors.numel.size()),
          tensors.numel.data(),
          weight.addresses.data(),
          gradient.addresses.data(),
          has_momentum ? tensors.roles[2].addresses.data() : nullptr,
          weight.dtype,
          gradient.dtype,
          momentum.dtype};
}

void steepest_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  py::gil_scoped_release unlocked;
  pysteep_steepest_step_cpu(&all, &options, &rounded.rounding);
}

double steepest_power_sum_cpu(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  double sum = 0;
  py::gil_scoped_release unlocked;
  pysteep_steepest_power_sum_cpu(&all, &options, &rounded.rounding, &sum);
  return sum;
}

#ifdef PYSTEEP_WITH_CUDA
void steepest_step_cuda(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding,
                        int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  py::gil_scoped_release unlocked;
  check_cuda(
      pysteep_steepest_step_cuda(&all, &options, &rounded.rounding, tensors.device.index, reinterpret_cast<void*>(stream)));
}

void steepest_power_sum_cuda(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding,
                             int64_t partial_sums, int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_steepest_power_sum_cuda(&all, &options, &rounded.rounding, reinterpret_cast<double*>(partial_sums),
                                             tensors.device.index, reinterpret_cast<void*>(stream)));
}

void steepest_step_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  check_cuda(pysteep_steepest_step_cuda_on_host(&all, &options, &rounded.rounding));
}

double steepest_power_sum_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options,
                                       const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  std::vector<double> partial_sums(PYSTEEP_CUDA_PARTIAL_SUMS);
  check_cuda(pysteep_steepest_power_sum_cuda_on_host(&all, &options, &rounded.rounding, partial_sums.data()));
  return std::accumulate(partial_sums.begin(), partial_sums.end(), 0.0);
}
#endif

}  // namespace

void register_steepest_step(py::module_& m) {
  m.attr("CUDA_PARTIAL_SUMS") = PYSTEEP_CUDA_PARTIAL_SUMS;
  m.def("steepest_step_cpu", &steepest_step_cpu, py::arg("tensors"), py::arg("options"), py::arg("rounding"));
  m.def("steepest_power_sum_cpu", &steepest_power_sum_cpu, py::arg("tensors"), py::arg("options"), py::arg("rounding"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("steepest_step_cuda", &steepest_step_cuda, py::arg("tensors"), py::arg("options"), py::arg("rounding"),
        py::arg("stream"));
  m.def("steepest_power_sum_cuda", &steepest_power_sum_cuda, py::arg("tensors"), py::arg("options"), py::arg("rounding"),
        py::arg("partial_sums"), py::arg("stream"));
  m.def("steepest_step_cuda_on_host", &steepest_step_cuda_on_host, py::arg("tensors"), py::arg("options"), py::arg("rounding"));
  m.def("steepest_power_sum_cuda_on_host", &steepest_power_sum_cuda_on_host, py::arg("tensors"), py::arg("options"),
        py::arg("rounding"));
#endif
}

}  // namespace pysteep
