// diagonal_flow as Python calls it. The interface is pysteep/diagonal_flow.h.
#include "pysteep/diagonal_flow.h"

#include <array>
#include <cstdint>
#include <new>

#include "python/bindings.h"
#include "python/checks.h"

namespace pysteep {
namespace {

// Memory by address: [runs, n] and so on, in the order of pysteep_diagonal_flows.
pysteep_diagonal_flows diagonal_flows(const std::array<int64_t, 3>& sizes, const std::array<int64_t, 5>& tensors,
                                      const std::array<int64_t, 7>& of_runs, int64_t batch_size, int loss, bool mean,
                                      const std::array<double, 3>& adam, int dtype) {
  check_flows(sizes, batch_size, loss, dtype);
  const auto numbers = [&](size_t i) { return reinterpret_cast<const double*>(of_runs[i]); };
  const auto integers = [&](size_t i) { return reinterpret_cast<const int64_t*>(of_runs[i]); };
  const auto memory = [&](size_t i) { return reinterpret_cast<void*>(tensors[i]); };
  return {sizes[0],
          sizes[1],
          sizes[2],
          memory(0),
          memory(1),
          memory(2),
          memory(3),
          memory(4),
          integers(0),
          integers(1),
          reinterpret_cast<const uint64_t*>(of_runs[2]),
          numbers(3),
          numbers(4),
          numbers(5),
          numbers(6),
          batch_size,
          static_cast<pysteep_flow_loss>(loss),
          mean,
          adam[0],
          adam[1],
          adam[2],
          static_cast<pysteep_dtype>(dtype)};
}

void diagonal_flow_cpu(const pysteep_diagonal_flows& flows, int64_t begin, int64_t end) {
  py::gil_scoped_release unlocked;
  if (pysteep_diagonal_flow_cpu(&flows, begin, end) != 0) throw std::bad_alloc();
}

#ifdef PYSTEEP_WITH_CUDA
void diagonal_flow_cuda(const pysteep_diagonal_flows& flows, int64_t begin, int64_t end, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_diagonal_flow_cuda(&flows, begin, end, device, reinterpret_cast<void*>(stream)));
}

void diagonal_flow_cuda_on_host(const pysteep_diagonal_flows& flows, int64_t begin, int64_t end) {
  check_cuda(pysteep_diagonal_flow_cuda_on_host(&flows, begin, end));
}
#endif

}  // namespace

void register_diagonal_flow(py::module_& m) {
  py::class_<pysteep_diagonal_flows>(m, "DiagonalFlows")
      .def(py::init(&diagonal_flows), py::arg("sizes"), py::arg("tensors"), py::arg("of_runs"), py::arg("batch_size"),
           py::arg("loss"), py::arg("mean"), py::arg("adam"), py::arg("dtype"));
  m.def("diagonal_flow_cpu", &diagonal_flow_cpu, py::arg("flows"), py::arg("begin"), py::arg("end"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("diagonal_flow_cuda", &diagonal_flow_cuda, py::arg("flows"), py::arg("begin"), py::arg("end"), py::arg("device"),
        py::arg("stream"));
  m.def("diagonal_flow_cuda_on_host", &diagonal_flow_cuda_on_host, py::arg("flows"), py::arg("begin"), py::arg("end"));
#endif
}

}  // namespace pysteep
