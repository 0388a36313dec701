// The Python module pysteep._csrc: integers and tensors in, pointers out, the interpreter's lock released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/isa.h"
#include "pysteep/diagonal_flow.h"
#include "pysteep/factor_product.h"
#include "pysteep/factor_step.h"
#include "pysteep/mirror_step.h"
#include "pysteep/sign_vote.h"
#include "pysteep/steepest_step.h"
#include "python/checks.h"
#include "python/samples.h"
#include "python/tensors.h"

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
  require(dtype == PYSTEEP_FLOAT32 || dtype == PYSTEEP_FLOAT64, "a number's dtype code must be 2 or 3");
  return {0.0, reinterpret_cast<const void*>(address), static_cast<pysteep_dtype>(dtype)};
}

// What a call says of rounding; the last roles of its tensors hold the compensations.
struct Rounding {
  pysteep_rounding_mode mode;
  uint64_t seed;
  pysteep_scalar step;
  std::vector<uint32_t> stream;
  std::vector<int64_t> first;
};

Rounding rounding(int mode, uint64_t seed, const Number& step, std::vector<uint32_t> stream, std::vector<int64_t> first) {
  return {static_cast<pysteep_rounding_mode>(mode), seed, scalar(step), std::move(stream), std::move(first)};
}

struct RoundingView {
  std::vector<void*> compensations;
  size_t uncompensated;  // roles before those of the compensations
  pysteep_rounding rounding;

  // `rounded` roles have a compensation each.
  RoundingView(const Rounding& of_call, const Tensors& all, size_t rounded) {
    const bool compensated = of_call.mode == PYSTEEP_COMPENSATED, stochastic = of_call.mode == PYSTEEP_STOCHASTIC;
    check_rounding(all, of_call.mode, stochastic ? of_call.stream.size() : all.numel.size(),
                   stochastic ? of_call.first.size() : all.numel.size(), compensated ? rounded : 0);
    uncompensated = all.roles.size() - (compensated ? rounded : 0);
    for (size_t role = uncompensated; role < all.roles.size(); ++role)
      compensations.insert(compensations.end(), all.roles[role].addresses.begin(), all.roles[role].addresses.end());
    rounding = {of_call.mode, of_call.seed, of_call.step, of_call.stream.data(), of_call.first.data(), compensations.data()};
  }
};

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

// The tensors of one weight; an op leaves empty or 0 what it does not use.
struct Product {
  std::vector<void*> factors, tangents, factor_gradients;
  pysteep_product_tensors tensors;

  Product(int64_t numel, int dtype, const std::vector<int64_t>& factor, const std::vector<int64_t>& tangent, int64_t gradient,
          int64_t result, const std::vector<int64_t>& factor_gradient)
      : factors(pointers(factor)), tangents(pointers(tangent)), factor_gradients(pointers(factor_gradient)) {
    check_product(numel, dtype, factors.size(), tangents.size(), factor_gradients.size());
    tensors = {
        numel,           static_cast<int64_t>(factors.size()),    static_cast<pysteep_dtype>(dtype), factors.data(),
        tangents.data(), reinterpret_cast<const void*>(gradient), reinterpret_cast<void*>(result),   factor_gradients.data()};
  }
  Product(const Product&) = delete;
};

pysteep_steepest_options options(double q, const Number& beta1, const Number& beta2, double weight_decay,
                                 double coupled_weight_decay, bool maximize, const Number& lr, const Number& step_scale,
                                 const Number& grad_scale, const Number& found_inf) {
  return {q,          weight_decay,       coupled_weight_decay, maximize ? 1 : 0, scalar(beta1), scalar(beta2),
          scalar(lr), scalar(step_scale), scalar(grad_scale),   scalar(found_inf)};
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

void factor_step_cpu(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                     const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  py::gil_scoped_release unlocked;
  pysteep_factor_step_cpu(&view.tensors, &options, &rounded.rounding);
}

void mirror_step_cpu(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                     const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  py::gil_scoped_release unlocked;
  pysteep_mirror_step_cpu(&view.tensors, &options, &rounded.rounding);
}

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

template <int (*op)(const pysteep_product_tensors*)>
void product_cpu(const Product& product) {
  py::gil_scoped_release unlocked;
  op(&product.tensors);
}

#ifdef PYSTEEP_WITH_CUDA
void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA error: ") + pysteep_cuda_error_string(error));
}

void steepest_step_cuda(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding,
                        int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  py::gil_scoped_release unlocked;
  check(pysteep_steepest_step_cuda(&all, &options, &rounded.rounding, tensors.device.index, reinterpret_cast<void*>(stream)));
}

void steepest_power_sum_cuda(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding,
                             int64_t partial_sums, int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  py::gil_scoped_release unlocked;
  check(pysteep_steepest_power_sum_cuda(&all, &options, &rounded.rounding, reinterpret_cast<double*>(partial_sums),
                                        tensors.device.index, reinterpret_cast<void*>(stream)));
}

void steepest_step_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  check(pysteep_steepest_step_cuda_on_host(&all, &options, &rounded.rounding));
}

double steepest_power_sum_cuda_on_host(const Tensors& tensors, const pysteep_steepest_options& options,
                                       const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const pysteep_steepest_tensors all = view(tensors, rounded);
  std::vector<double> partial_sums(PYSTEEP_CUDA_PARTIAL_SUMS);
  check(pysteep_steepest_power_sum_cuda_on_host(&all, &options, &rounded.rounding, partial_sums.data()));
  return std::accumulate(partial_sums.begin(), partial_sums.end(), 0.0);
}

void factor_step_cuda(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                      const Rounding& rounding, int64_t stream) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  py::gil_scoped_release unlocked;
  check(pysteep_factor_step_cuda(&view.tensors, &options, &rounded.rounding, tensors.device.index,
                                 reinterpret_cast<void*>(stream)));
}

void factor_step_cuda_on_host(const Tensors& tensors, int64_t stored, int64_t depth, const pysteep_steepest_options& options,
                              const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, static_cast<size_t>(stored));
  const FactorView view(tensors, stored, depth, rounded);
  check(pysteep_factor_step_cuda_on_host(&view.tensors, &options, &rounded.rounding));
}

void mirror_step_cuda(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                      const pysteep_steepest_options& options, const Rounding& rounding, int64_t stream) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  py::gil_scoped_release unlocked;
  check(pysteep_mirror_step_cuda(&view.tensors, &options, &rounded.rounding, tensors.device.index,
                                 reinterpret_cast<void*>(stream)));
}

void mirror_step_cuda_on_host(const Tensors& tensors, const std::vector<int64_t>& balances, int64_t depth,
                              const pysteep_steepest_options& options, const Rounding& rounding) {
  const RoundingView rounded(rounding, tensors, 1);
  const MirrorView view(tensors, balances, depth);
  check(pysteep_mirror_step_cuda_on_host(&view.tensors, &options, &rounded.rounding));
}

void diagonal_flow_cuda(const pysteep_diagonal_flows& flows, int64_t begin, int64_t end, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check(pysteep_diagonal_flow_cuda(&flows, begin, end, device, reinterpret_cast<void*>(stream)));
}

void diagonal_flow_cuda_on_host(const pysteep_diagonal_flows& flows, int64_t begin, int64_t end) {
  check(pysteep_diagonal_flow_cuda_on_host(&flows, begin, end));
}

void pack_signs_cuda(const pysteep_votes& votes, int64_t phase, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check(pysteep_pack_signs_cuda(&votes, phase, device, reinterpret_cast<void*>(stream)));
}

void count_votes_cuda(const pysteep_votes& votes, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check(pysteep_count_votes_cuda(&votes, device, reinterpret_cast<void*>(stream)));
}

void pack_signs_cuda_on_host(const pysteep_votes& votes, int64_t phase) {
  check(pysteep_pack_signs_cuda_on_host(&votes, phase));
}

void count_votes_cuda_on_host(const pysteep_votes& votes) { check(pysteep_count_votes_cuda_on_host(&votes)); }

template <int (*op)(const pysteep_product_tensors*, int, void*)>
void product_cuda(const Product& product, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check(op(&product.tensors, device, reinterpret_cast<void*>(stream)));
}

template <int (*op)(const pysteep_product_tensors*)>
void product_cuda_on_host(const Product& product) {
  check(op(&product.tensors));
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
      .def(py::init([](const std::vector<std::vector<int64_t>>& roles, std::vector<int64_t> numel,
                       const std::vector<int>& dtypes, bool on_cuda, int device_index) {
        Tensors tensors{{}, std::move(numel), {on_cuda ? dlpack::cuda : dlpack::cpu, device_index}};
        check_tensors(roles, tensors.numel, dtypes);
        for (size_t role = 0; role < roles.size(); ++role)
          tensors.roles.push_back({pointers(roles[role]), static_cast<pysteep_dtype>(dtypes[role])});
        return tensors;
      }))
      .def_property_readonly("dtypes",
                             [](const Tensors& tensors) {
                               std::vector<int> dtypes;
                               for (const Role& role : tensors.roles) dtypes.push_back(role.dtype);
                               return dtypes;
                             })
      .def_property_readonly("on_cuda", [](const Tensors& tensors) { return tensors.device.type == dlpack::cuda; })
      .def_property_readonly("on_cpu", [](const Tensors& tensors) { return tensors.device.type == dlpack::cpu; })
      .def_property_readonly("device_index", [](const Tensors& tensors) { return tensors.device.index; });
  py::class_<pysteep_steepest_options>(m, "SteepestOptions").def(py::init(&options));
  py::class_<Product>(m, "Product")
      .def(py::init<int64_t, int, const std::vector<int64_t>&, const std::vector<int64_t>&, int64_t, int64_t,
                    const std::vector<int64_t>&>());
  py::class_<pysteep_diagonal_flows>(m, "DiagonalFlows").def(py::init(&diagonal_flows));
  py::class_<Rounding>(m, "Rounding").def(py::init(&rounding));
  py::class_<pysteep_votes>(m, "Votes").def(py::init(&votes));
  m.def("flat_tensors", &flat_tensors);
  m.def("plain_gradients", &plain_gradients);
  py::class_<Samples>(m, "Samples")
      .def(py::init(&samples))
      .def("changed", [](const Samples& own, const py::list& marks) { return own.are_of(blocks(marks)) && own.changed(); })
      .def("note", [](Samples& own, const py::list& marks) {
        const bool noted = own.are_of(blocks(marks));
        if (noted) own.note();
        return noted;
      });

  m.def("steepest_step_cpu", &steepest_step_cpu);
  m.def("steepest_power_sum_cpu", &steepest_power_sum_cpu);
  m.def("factor_product_cpu", &product_cpu<pysteep_factor_product_cpu>);
  m.def("factor_product_backward_cpu", &product_cpu<pysteep_factor_product_backward_cpu>);
  m.def("factor_product_double_backward_cpu", &product_cpu<pysteep_factor_product_double_backward_cpu>);
  m.def("factor_step_cpu", &factor_step_cpu);
  m.def("mirror_step_cpu", &mirror_step_cpu);
  m.def("diagonal_flow_cpu", &diagonal_flow_cpu);
  m.def("pack_signs_cpu", &pack_signs_cpu);
  m.def("count_votes_cpu", &count_votes_cpu);
#ifdef PYSTEEP_WITH_CUDA
  m.def("steepest_step_cuda", &steepest_step_cuda);
  m.def("steepest_power_sum_cuda", &steepest_power_sum_cuda);
  m.def("steepest_step_cuda_on_host", &steepest_step_cuda_on_host);
  m.def("steepest_power_sum_cuda_on_host", &steepest_power_sum_cuda_on_host);
  m.def("factor_product_cuda", &product_cuda<pysteep_factor_product_cuda>);
  m.def("factor_product_backward_cuda", &product_cuda<pysteep_factor_product_backward_cuda>);
  m.def("factor_product_double_backward_cuda", &product_cuda<pysteep_factor_product_double_backward_cuda>);
  m.def("factor_product_cuda_on_host", &product_cuda_on_host<pysteep_factor_product_cuda_on_host>);
  m.def("factor_product_backward_cuda_on_host", &product_cuda_on_host<pysteep_factor_product_backward_cuda_on_host>);
  m.def("factor_product_double_backward_cuda_on_host",
        &product_cuda_on_host<pysteep_factor_product_double_backward_cuda_on_host>);
  m.def("factor_step_cuda", &factor_step_cuda);
  m.def("factor_step_cuda_on_host", &factor_step_cuda_on_host);
  m.def("mirror_step_cuda", &mirror_step_cuda);
  m.def("mirror_step_cuda_on_host", &mirror_step_cuda_on_host);
  m.def("diagonal_flow_cuda", &diagonal_flow_cuda);
  m.def("diagonal_flow_cuda_on_host", &diagonal_flow_cuda_on_host);
  m.def("pack_signs_cuda", &pack_signs_cuda);
  m.def("count_votes_cuda", &count_votes_cuda);
  m.def("pack_signs_cuda_on_host", &pack_signs_cuda_on_host);
  m.def("count_votes_cuda_on_host", &count_votes_cuda_on_host);
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
