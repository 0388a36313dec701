// Samples of parameters, by the marks that Python keeps of them.
#include "python/samples.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"

namespace pysteep {
namespace {

// The blocks of memory of `marks`, which are tuples of a version, an address and a size.
std::vector<Samples::Block> blocks(const py::list& marks) {
  std::vector<Samples::Block> result;
  result.reserve(marks.size());
  for (const py::handle& mark : marks) {
    require(PyTuple_Check(mark.ptr()) && PyTuple_GET_SIZE(mark.ptr()) == 3, "a mark must be a tuple of three integers");
    const int64_t address = PyLong_AsLongLong(PyTuple_GET_ITEM(mark.ptr(), 1));
    const int64_t bytes = PyLong_AsLongLong(PyTuple_GET_ITEM(mark.ptr(), 2));
    if ((address == -1 || bytes == -1) && PyErr_Occurred()) throw py::error_already_set();
    result.push_back({address, bytes});
  }
  return result;
}

Samples samples(const py::list& marks, const std::vector<int64_t>& readable) {
  std::vector<Samples::Block> of = blocks(marks);
  require(of.size() == readable.size(), "readable must have an entry for each mark");
  for (size_t i = 0; i < of.size(); ++i)
    require(readable[i] >= 0 && readable[i] <= of[i].bytes, "readable must be between 0 and the size of the block");
  return {std::move(of), readable};
}

bool changed(const Samples& own, const py::list& marks) { return own.are_of(blocks(marks)) && own.changed(); }

bool note(Samples& own, const py::list& marks) {
  const bool noted = own.are_of(blocks(marks));
  if (noted) own.note();
  return noted;
}

}  // namespace

void register_samples(py::module_& m) {
  py::class_<Samples>(m, "Samples")
      .def(py::init(&samples), py::arg("marks"), py::arg("readable"))
      .def("changed", &changed, py::arg("marks"))
      .def("note", &note, py::arg("marks"));
}

}  // namespace pysteep
