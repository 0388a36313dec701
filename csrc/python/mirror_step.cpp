// mirror_step as Python calls it. The interface is pysteep/mirror_step.h.
#include "pysteep/mirror_step.h"

#include <cstdint>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"
#include "python/steps.h"

namespace pysteep {
namespace {

struct MirrorView {
  std::vector<const double*> balances;
  pysteep_mirror_tensors tensors;

  MirrorView(const Tensors& all, const std::vector<int64_t>& addresses, int64_t depth) {
    check_mirror(all, addresses.size(), depth);
    for (int64_t address : addresses) balances.push_back(reinterpret_cast<const double*>(address));
    tensors = {static_cast<int64_t>(all.numel.size()), depth,           all.numel.data(),   all.roles[0].addresses.data(),
               all.roles[1].addresses.data(),          balances.data(), all.roles[0].dtype, all.roles[1].dtype};
  }
};

void mirror_step_cpu(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                     const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  py::gil_scoped_release unlocked;
  pysteep_mirror_step_cpu(&view.tensors, &options, &rounded.rounding);
}

#ifdef PYSTEEP_WITH_CUDA
void mirror_step_cuda(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                      const pysteep_steepest_options& options, const Rounding& rounding, int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_mirror_step_cuda(&view.tensors, &options, &rounded.rounding, tensors.device.index,
                                      reinterpret_cast<void*>(stream)));
}

void mirror_step_cuda_on_host(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                              const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  check_cuda(pysteep_mirror_step_cuda_on_host(&view.tensors, &options, &rounded.rounding));
}
#endif

}  // namespace

void register_mirror_step(py::module_& m) {
  m.def("mirror_step_cpu", &mirror_step_cpu, py::arg("tensors"), py::arg("balances"), py::arg("depth"), py::arg("options"),
        py::arg("rounding"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("mirror_step_cuda", &mirror_step_cuda, py::arg("tensors"), py::arg("balances"), py::arg("depth"), py::arg("options"),
        py::arg("rounding"), py::arg("stream"));
  m.def("mirror_step_cuda_on_host", &mirror_step_cuda_on_host, py::arg("tensors"), py::arg("balances"), py::arg("depth"),
        py::arg("options"), py::arg("rounding"));
#endif
}

}  // namespace pysteep
