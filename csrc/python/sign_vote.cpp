// sign_vote as Python calls it. The interface is pysteep/sign_vote.h.
#include "pysteep/sign_vote.h"

#include <cstdint>

#include "python/bindings.h"

namespace pysteep {
namespace {

pysteep_votes votes(int64_t rows, int64_t numel, int64_t row_bytes, int64_t values, int64_t words, int dtype) {
  return {rows,
          numel,
          row_bytes,
          reinterpret_cast<void*>(values),
          reinterpret_cast<uint8_t*>(words),
          static_cast<pysteep_dtype>(dtype)};
}

void pack_signs_cpu(const pysteep_votes& votes, int64_t phase) {
  py::gil_scoped_release unlocked;
  pysteep_pack_signs_cpu(&votes, phase);
}

void count_votes_cpu(const pysteep_votes& votes) {
  py::gil_scoped_release unlocked;
  pysteep_count_votes_cpu(&votes);
}

#ifdef PYSTEEP_WITH_CUDA
void pack_signs_cuda(const pysteep_votes& votes, int64_t phase, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_pack_signs_cuda(&votes, phase, device, reinterpret_cast<void*>(stream)));
}

void count_votes_cuda(const pysteep_votes& votes, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check_cuda(pysteep_count_votes_cuda(&votes, device, reinterpret_cast<void*>(stream)));
}

void pack_signs_cuda_on_host(const pysteep_votes& votes, int64_t phase) {
  check_cuda(pysteep_pack_signs_cuda_on_host(&votes, phase));
}

void count_votes_cuda_on_host(const pysteep_votes& votes) { check_cuda(pysteep_count_votes_cuda_on_host(&votes)); }
#endif

}  // namespace

void register_sign_vote(py::module_& m) {
  py::class_<pysteep_votes>(m, "Votes")
      .def(py::init(&votes), py::arg("rows"), py::arg("numel"), py::arg("row_bytes"), py::arg("values"), py::arg("words"),
           py::arg("dtype"));
  m.def("pack_signs_cpu", &pack_signs_cpu, py::arg("votes"), py::arg("phase"));
  m.def("count_votes_cpu", &count_votes_cpu, py::arg("votes"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("pack_signs_cuda", &pack_signs_cuda, py::arg("votes"), py::arg("phase"), py::arg("device_index"), py::arg("stream"));
  m.def("count_votes_cuda", &count_votes_cuda, py::arg("votes"), py::arg("device_index"), py::arg("stream"));
  m.def("pack_signs_cuda_on_host", &pack_signs_cuda_on_host, py::arg("votes"), py::arg("phase"));
  m.def("count_votes_cuda_on_host", &count_votes_cuda_on_host, py::arg("votes"));
#endif
}

}  // namespace pysteep
