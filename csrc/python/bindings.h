// What the files of the Python module share. Each registers functions and classes, their arguments named as in
// pysteep/_csrc.pyi, checks what it is given and releases the interpreter's lock around a kernel.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pysteep/steepest_step.h"

namespace py = pybind11;

namespace pysteep {

inline std::vector<void*> pointers(const std::vector<int64_t>& addresses) {
  std::vector<void*> result;
  for (int64_t address : addresses) result.push_back(reinterpret_cast<void*>(address));
  return result;
}

#ifdef PYSTEEP_WITH_CUDA
inline void check_cuda(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA error: ") + pysteep_cuda_error_string(error));
}
#endif

void register_tensors(py::module_&);
void register_samples(py::module_&);
void register_steps(py::module_&);
void register_steepest_step(py::module_&);
void register_factor_step(py::module_&);
void register_mirror_step(py::module_&);
void register_factor_product(py::module_&);
void register_diagonal_flow(py::module_&);
void register_sign_vote(py::module_&);

}  // namespace pysteep
