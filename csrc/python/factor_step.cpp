// factor_step as Python calls it. The interface is pysteep/factor_step.h.
#include "pysteep/factor_step.h"

#include <cstdint>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"
#include "python/steps.h"

namespace pysteep {
namespace {

// What the C interface of factor_step points to. The roles are weight, gradient, `stored` factors, as many momenta or none.
struct FactorView {
  std::vector<void*> factors, momenta;
  pysteep_factor_tensors tensors;

  FactorView(const Tensors& all, int64_t stored, int64_t depth, const RoundingView& rounding) {
    check_factors(all, stored, depth);
    const size_t count = static_cast<size_t>(stored), roles = rounding.uncompensated;
    const Role &weight = all.roles[0], &gradient = all.roles[1], &factor = all.roles[2], &last = all.roles[roles - 1];
    for (size_t k = 2; k < roles; ++k) {
      std::vector<void*>& target = k < 2 + count ? factors : momenta;
      target.insert(target.end(), all.roles[k].addresses.begin(), all.roles[k].addresses.end());
    }
    tensors = {static_cast<int64_t>(all.numel.size()),
               stored,
               depth,
               all.numel.data(),
               weight.addresses.data(),
               gradient.addresses.data(),
               factors.data(),
               momenta.empty() ? nullptr : momenta.data(),
               weight.dtype,
               gradient.dtype,
               factor.dtype,
               last.dtype};
  }
};

void factor_step_cpu(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                     const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  py::gil_scoped_release unlocked;
  pysteep_factor_step_cpu(&view.tensors, &options, &rounded.rounding);
}

#ifdef PYSTEEP_WITH_CUDA
void factor_step_cuda(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                      const Rounding& rounding, int64_t stream) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_factor_step_cuda(&view.tensors, &options, &rounded.rounding, tensors.device.index,
                                      reinterpret_cast<void*>(stream)));
}

void factor_step_cuda_on_host(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                              const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  check_cuda(pysteep_factor_step_cuda_on_host(&view.tensors, &options, &rounded.rounding));
}
#endif

}  // namespace

void register_factor_step(py::module_& m) {
  m.def("factor_step_cpu", &factor_step_cpu, py::arg("tensors"), py::arg("stored"), py::arg("depth"), py::arg("options"),
        py::arg("rounding"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("factor_step_cuda", &factor_step_cuda, py::arg("tensors"), py::arg("stored"), py::arg("depth"), py::arg("options"),
        py::arg("rounding"), py::arg("stream"));
  m.def("factor_step_cuda_on_host", &factor_step_cuda_on_host, py::arg("tensors"), py::arg("stored"), py::arg("depth"),
        py::arg("options"), py::arg("rounding"));
#endif
}

}  // namespace pysteep
