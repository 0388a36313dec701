// Lists of tensors as one call's Tensors, and the gradients of parameters.
#include "python/tensors.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"
#include "python/dlpack.h"

namespace pysteep {
namespace {

// Describes tensors for flat_tensors; `next` is false when a tensor needs the caller's general path.
class Reader {
 public:
  Reader(const dlpack::ExchangeApi& api, py::handle tensor_type, Tensors& tensors)
      : api_(api), tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())), tensors_(tensors) {}

  bool next(PyObject* object, Role& role, dlpack::Tensor& tensor) {
    if (!PyObject_TypeCheck(object, tensor_type_)) return false;  // the interface takes that on trust
    if (api_.tensor_from_object(object, &tensor) != 0) {
      PyErr_Clear();  // a sparse or meta tensor, say
      return false;
    }
    const std::optional<pysteep_dtype> dtype = dtype_of(tensor.dtype);
    if (!dtype || (tensor.data == nullptr && numel_of(tensor) != 0)) return false;
    if (tensors_.roles[0].addresses.empty()) tensors_.device = tensor.device;
    if (role.addresses.empty()) role.dtype = *dtype;
    if (role.dtype != *dtype || tensor.device != tensors_.device) return false;
    // A tensor with a lazy minus sign is the imaginary part of a conjugate: its stride is 2, unless it has one element.
    if (numel_of(tensor) == 1 && py::handle(object).attr("is_neg")().cast<bool>()) return false;
    role.addresses.push_back(static_cast<char*>(tensor.data) + tensor.byte_offset);
    return true;
  }

 private:
  const dlpack::ExchangeApi& api_;
  PyTypeObject* tensor_type_;
  Tensors& tensors_;
};

// What the ops accept beside a weight: its dtype, or the one it computes in.
bool accepted(pysteep_dtype dtype, pysteep_dtype weight) {
  return dtype != PYSTEEP_INT16 && (dtype == weight || (dtype == PYSTEEP_FLOAT32 && weight != PYSTEEP_FLOAT64));
}

// The lists of tensors, weights first, as one call's Tensors, if every tensor is plain: on one CPU or NVIDIA GPU, an accepted
// dtype a list, one dense memory layout shared by the tensors at one index. Else nothing. The last `compensations` lists are of
// int16. `exchange_api` is the capsule of `tensor_type`, torch.Tensor.
std::optional<Tensors> flat_tensors(const py::capsule& exchange_api, const py::type& tensor_type,
                                    const std::vector<py::list>& lists, size_t compensations) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), dlpack::capsule_name));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != dlpack::major_version) return std::nullopt;
  require(!lists.empty(), "there must be a list of weights");
  const size_t count = lists[0].size();
  for (const py::list& list : lists)
    if (list.size() != count) return std::nullopt;
  Tensors tensors;
  tensors.numel.reserve(count);
  tensors.roles.resize(lists.size());
  for (Role& role : tensors.roles) role.addresses.reserve(count);
  Reader reader(*api, tensor_type, tensors);
  for (size_t i = 0; i < count; ++i) {
    dlpack::Tensor weight{}, other;
    for (size_t role = 0; role < lists.size(); ++role) {
      dlpack::Tensor& tensor = role == 0 ? weight : other;
      if (!reader.next(PyList_GET_ITEM(lists[role].ptr(), static_cast<Py_ssize_t>(i)), tensors.roles[role], tensor))
        return std::nullopt;
      if (role == 0 ? !is_dense(weight) : !same_layout(weight, other)) return std::nullopt;
    }
    tensors.numel.push_back(numel_of(weight));
  }
  if (tensors.device.type != dlpack::cpu && tensors.device.type != dlpack::cuda) return std::nullopt;
  for (size_t role = 0; role < tensors.roles.size(); ++role) {
    const pysteep_dtype dtype = tensors.roles[role].dtype;
    const bool compensates = role + compensations >= tensors.roles.size();
    if (compensates ? dtype != PYSTEEP_INT16 : !accepted(dtype, tensors.roles[0].dtype)) return std::nullopt;
  }
  return tensors;
}

// The gradients of parameters, None where there is none or the parameter requires none, and whether each has one; nothing
// unless all tensors are of `tensor_type` or `parameter_type` themselves, torch's: attributes of their subclasses may mean
// something else. `grad` and `requires_grad` are those of `tensor_type`, looked up once.
std::optional<std::pair<py::list, bool>> plain_gradients(const py::type& tensor_type, const py::type& parameter_type,
                                                         const py::object& grad, const py::object& requires_grad,
                                                         const py::list& params) {
  const descrgetfunc get = Py_TYPE(grad.ptr())->tp_descr_get, get_required = Py_TYPE(requires_grad.ptr())->tp_descr_get;
  require(get != nullptr, "grad must be the attribute of a type");
  require(get_required != nullptr, "requires_grad must be the attribute of a type");
  const auto is_plain = [&](PyObject* object) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_type.ptr() || type == parameter_type.ptr();
  };
  py::list gradients(params.size());
  bool complete = true;
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    if (!is_plain(param)) return std::nullopt;
    const auto required = py::reinterpret_steal<py::object>(get_required(requires_grad.ptr(), param, tensor_type.ptr()));
    if (!required) throw py::error_already_set();
    PyObject* gradient = required.ptr() == Py_True ? get(grad.ptr(), param, tensor_type.ptr()) : py::none().release().ptr();
    if (gradient == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(gradients.ptr(), static_cast<Py_ssize_t>(i), gradient);
    if (gradient == Py_None)
      complete = false;
    else if (!is_plain(gradient))
      return std::nullopt;
  }
  return std::pair(std::move(gradients), complete);
}

// By address: those that flat_tensors leaves to its caller.
Tensors described(const std::vector<std::vector<int64_t>>& roles, std::vector<int64_t> numel, const std::vector<int>& dtypes,
                  bool on_cuda, int device_index) {
  Tensors tensors{{}, std::move(numel), {on_cuda ? dlpack::cuda : dlpack::cpu, device_index}};
  check_tensors(roles, tensors.numel, dtypes);
  for (size_t role = 0; role < roles.size(); ++role)
    tensors.roles.push_back({pointers(roles[role]), static_cast<pysteep_dtype>(dtypes[role])});
  return tensors;
}

}  // namespace

void register_tensors(py::module_& m) {
  py::class_<Tensors>(m, "Tensors")
      .def(py::init(&described), py::arg("roles"), py::arg("numel"), py::arg("dtypes"), py::arg("on_cuda"),
           py::arg("device_index"))
      .def_property_readonly("dtypes",
                             [](const Tensors& tensors) {
                               std::vector<int> dtypes;
                               for (const Role& role : tensors.roles) dtypes.push_back(role.dtype);
                               return dtypes;
                             })
      .def_property_readonly("on_cuda", [](const Tensors& tensors) { return tensors.device.type == dlpack::cuda; })
      .def_property_readonly("on_cpu", [](const Tensors& tensors) { return tensors.device.type == dlpack::cpu; })
      .def_property_readonly("device_index", [](const Tensors& tensors) { return tensors.device.index; });
  m.def("flat_tensors", &flat_tensors, py::arg("exchange_api"), py::arg("tensor_type"), py::arg("roles"),
        py::arg("compensations"));
  m.def("plain_gradients", &plain_gradients, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("grad"),
        py::arg("requires_grad"), py::arg("params"));
}

}  // namespace pysteep
