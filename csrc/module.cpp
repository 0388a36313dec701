// The Python module pysteep._csrc: integers and tensors in, pointers out, the interpreter's lock released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/isa.h"
#include "pysteep/steepest_step.h"
#include "tensors.h"

namespace py = pybind11;

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
    if (tensors_.weight.addresses.empty()) tensors_.device = tensor.device;
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

// What the ops accept of gradients and momenta: the weight's dtype, or the one it computes in.
bool accepted(pysteep_dtype dtype, pysteep_dtype weight) {
  return dtype == weight || (dtype == PYSTEEP_FLOAT32 && weight != PYSTEEP_FLOAT64);
}

// The lists as one call's Tensors, if every tensor is plain: on one CPU or NVIDIA GPU, an accepted dtype a list, one dense
// memory layout shared by the weight, its gradient and its momentum. Else nothing. `momenta` is empty when there is none.
// `exchange_api` is the capsule of `tensor_type`, torch.Tensor.
std::optional<Tensors> flat_tensors(const py::capsule& exchange_api, const py::type& tensor_type, const py::list& weights,
                                    const py::list& gradients, const py::list& momenta) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), dlpack::capsule_name));
  if (api == nullptr) throw py::error_already_set();
  const size_t count = weights.size();
  if (api->major != dlpack::major_version || gradients.size() != count || (!momenta.empty() && momenta.size() != count))
    return std::nullopt;
  Tensors tensors;
  Reader reader(*api, tensor_type, tensors);
  for (size_t i = 0; i < count; ++i) {
    const auto item = static_cast<Py_ssize_t>(i);
    dlpack::Tensor weight, other;
    if (!reader.next(PyList_GET_ITEM(weights.ptr(), item), tensors.weight, weight) || !is_dense(weight)) return std::nullopt;
    if (!reader.next(PyList_GET_ITEM(gradients.ptr(), item), tensors.gradient, other) || !same_layout(weight, other))
      return std::nullopt;
    if (!momenta.empty() &&
        (!reader.next(PyList_GET_ITEM(momenta.ptr(), item), tensors.momentum, other) || !same_layout(weight, other)))
      return std::nullopt;
    tensors.numel.push_back(numel_of(weight));
  }
  if (tensors.device.type != dlpack::cpu && tensors.device.type != dlpack::cuda) return std::nullopt;
  if (!accepted(tensors.gradient.dtype, tensors.weight.dtype)) return std::nullopt;
  if (!momenta.empty() && !accepted(tensors.momentum.dtype, tensors.weight.dtype)) return std::nullopt;
  return tensors;
}

std::vector<void*> pointers(const std::vector<int64_t>& addresses) {
  std::vector<void*> result;
  for (int64_t address : addresses) result.push_back(reinterpret_cast<void*>(address));
  return result;
}

// A number, or the address of a float32 or float64 on the device.
using Number = std::variant<double, std::pair<int64_t, int>>;

pysteep_scalar scalar(const Number& number) {
  if (const double* value = std::get_if<double>(&number)) return {*value, nullptr, PYSTEEP_FLOAT64};
  const auto& [address, dtype] = std::get<1>(number);
  return {0.0, reinterpret_cast<const void*>(address), static_cast<pysteep_dtype>(dtype)};
}

pysteep_steepest_tensors view(const Tensors& tensors) {
  return {static_cast<int64_t>(tensors.numel.size()),
          tensors.numel.data(),
          tensors.weight.addresses.data(),
          tensors.gradient.addresses.data(),
          tensors.momentum.addresses.empty() ? nullptr : tensors.momentum.addresses.data(),
          tensors.weight.dtype,
          tensors.gradient.dtype,
          tensors.momentum.dtype};
}

pysteep_steepest_options options(double q, double beta1, double beta2, double weight_decay, double coupled_weight_decay,
                                 bool maximize, const Number& lr, const Number& step_scale, const Number& grad_scale,
                                 const Number& found_inf) {
  return {q,
          beta1,
          beta2,
          weight_decay,
          coupled_weight_decay,
          maximize ? 1 : 0,
          scalar(lr),
          scalar(step_scale),
          scalar(grad_scale),
          scalar(found_inf)};
}

void steepest_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options) {
  const pysteep_steepest_tensors all = view(tensors);
  py::gil_scoped_release unlocked;
  pysteep_steepest_step_cpu(&all, &options);
}

double steepest_power_sum_cpu(const Tensors& tensors, const pysteep_steepest_options& options) {
  const pysteep_steepest_tensors all = view(tensors);
  double sum = 0;
  py::gil_scoped_release unlocked;
  pysteep_steepest_power_sum_cpu(&all, &options, &sum);
  return sum;
}

#ifdef PYSTEEP_WITH_CUDA
void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA error: ") + pysteep_cuda_error_string(error));
}

void steepest_step_cuda(const Tensors& tensors, const pysteep_steepest_options& options, int64_t stream) {
  const pysteep_steepest_tensors all = view(tensors);
  py::gil_scoped_release unlocked;
  check(pysteep_steepest_step_cuda(&all, &options, tensors.device.index, reinterpret_cast<void*>(stream)));
}

void steepest_power_sum_cuda(const Tensors& tensors, const pysteep_steepest_options& options, int64_t partial_sums,
                             int64_t stream) {
  const pysteep_steepest_tensors all = view(tensors);
  py::gil_scoped_release unlocked;
  check(pysteep_steepest_power_sum_cuda(&all, &options, reinterpret_cast<double*>(partial_sums), tensors.device.index,
                                        reinterpret_cast<void*>(stream)));
}

void steepest_step_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options) {
  const pysteep_steepest_tensors all = view(tensors);
  check(pysteep_steepest_step_cuda_on_host(&all, &options));
}

double steepest_power_sum_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options) {
  const pysteep_steepest_tensors all = view(tensors);
  std::vector<double> partial_sums(PYSTEEP_CUDA_PARTIAL_SUMS);
  check(pysteep_steepest_power_sum_cuda_on_host(&all, &options, partial_sums.data()));
  return std::accumulate(partial_sums.begin(), partial_sums.end(), 0.0);
}
#endif

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
  py::class_<Tensors>(m, "Tensors")
      .def(py::init([](const std::vector<int64_t>& weights, const std::vector<int64_t>& gradients,
                       const std::vector<int64_t>& momenta, std::vector<int64_t> numel, std::array<int, 3> dtypes, bool on_cuda,
                       int device_index) {
        const auto dtype = [&](size_t role) { return static_cast<pysteep_dtype>(dtypes[role]); };
        return Tensors{{pointers(weights), dtype(0)},
                       {pointers(gradients), dtype(1)},
                       {pointers(momenta), dtype(2)},
                       std::move(numel),
                       {on_cuda ? dlpack::cuda : dlpack::cpu, device_index}};
      }))
      .def_property_readonly("on_cuda", [](const Tensors& tensors) { return tensors.device.type == dlpack::cuda; })
      .def_property_readonly("on_cpu", [](const Tensors& tensors) { return tensors.device.type == dlpack::cpu; })
      .def_property_readonly("device_index", [](const Tensors& tensors) { return tensors.device.index; });
  py::class_<pysteep_steepest_options>(m, "SteepestOptions").def(py::init(&options));
  m.def("flat_tensors", &flat_tensors);

  m.def("steepest_step_cpu", &steepest_step_cpu);
  m.def("steepest_power_sum_cpu", &steepest_power_sum_cpu);
#ifdef PYSTEEP_WITH_CUDA
  m.def("steepest_step_cuda", &steepest_step_cuda);
  m.def("steepest_power_sum_cuda", &steepest_power_sum_cuda);
  m.def("steepest_step_cuda_on_host", &steepest_step_cuda_on_host);
  m.def("steepest_power_sum_cuda_on_host", &steepest_power_sum_cuda_on_host);
#endif

  m.attr("CUDA_PARTIAL_SUMS") = PYSTEEP_CUDA_PARTIAL_SUMS;

  m.def("isa", [] { return isa_name(isa()); });
  m.def("select_isa", [](const std::string& name) {
    if (!select_isa(name.c_str())) throw py::value_error("select_isa: this machine does not run '" + name + "'");
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::baseline})
      if (isa_runs_here(candidate)) names.emplace_back(isa_name(candidate));
    return names;
  });
  m.def("cuda_architectures", &cuda_architectures);
}
