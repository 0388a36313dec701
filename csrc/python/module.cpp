// The Python module pysteep._csrc: integers and tensors in, pointers out, the interpreter's lock released around every kernel.
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "python/bindings.h"

namespace pysteep {
namespace {

// "sm_90", "compute_90", …: what the build was made for.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#ifdef PYSTEEP_WITH_CUDA
  std::istringstream all(PYSTEEP_CUDA_ARCHITECTURES);
  for (std::string name; all >> name;) names.push_back(name);
#endif
  return names;
}

}  // namespace
}  // namespace pysteep

PYBIND11_MODULE(_csrc, m) {
  using namespace pysteep;
  // Classes first: a signature names those that are registered already.
  register_tensors(m);
  register_samples(m);
  register_steps(m);
  register_steepest_step(m);
  register_factor_step(m);
  register_mirror_step(m);
  register_factor_product(m);
  register_diagonal_flow(m);
  register_sign_vote(m);

  m.def("isa", [] { return isa_name(isa()); });
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (!select_isa(name.c_str())) throw py::value_error("select_isa: this machine does not run '" + name + "'");
      },
      py::arg("name"));
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::baseline})
      if (isa_runs_here(candidate)) names.emplace_back(isa_name(candidate));
    return names;
  });
  m.def("cuda_architectures", &cuda_architectures);
}
