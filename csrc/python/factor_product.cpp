// factor_product as Python calls it. The interface is pysteep/factor_product.h.
#include "pysteep/factor_product.h"

#include <cstdint>
#include <vector>

#include "python/bindings.h"
#include "python/checks.h"

namespace pysteep {
namespace {

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

template <int (*op)(const pysteep_product_tensors*)>
void product_cpu(const Product& product) {
  py::gil_scoped_release unlocked;
  op(&product.tensors);
}

#ifdef PYSTEEP_WITH_CUDA
template <int (*op)(const pysteep_product_tensors*, int, void*)>
void product_cuda(const Product& product, int device, int64_t stream) {
  py::gil_scoped_release unlocked;
  check_cuda(op(&product.tensors, device, reinterpret_cast<void*>(stream)));
}

template <int (*op)(const pysteep_product_tensors*)>
void product_cuda_on_host(const Product& product) {
  check_cuda(op(&product.tensors));
}
#endif

}  // namespace

void register_factor_product(py::module_& m) {
  py::class_<Product>(m, "Product")
      .def(py::init<int64_t, int, const std::vector<int64_t>&, const std::vector<int64_t>&, int64_t, int64_t,
                    const std::vector<int64_t>&>(),
           py::arg("numel"), py::arg("dtype"), py::arg("factors"), py::arg("tangents"), py::arg("gradient"), py::arg("result"),
           py::arg("factor_gradients"));
  m.def("factor_product_cpu", &product_cpu<pysteep_factor_product_cpu>, py::arg("product"));
  m.def("factor_product_backward_cpu", &product_cpu<pysteep_factor_product_backward_cpu>, py::arg("product"));
  m.def("factor_product_double_backward_cpu", &product_cpu<pysteep_factor_product_double_backward_cpu>, py::arg("product"));
#ifdef PYSTEEP_WITH_CUDA
  m.def("factor_product_cuda", &product_cuda<pysteep_factor_product_cuda>, py::arg("product"), py::arg("device_index"),
        py::arg("stream"));
  m.def("factor_product_backward_cuda", &product_cuda<pysteep_factor_product_backward_cuda>, py::arg("product"),
        py::arg("device_index"), py::arg("stream"));
  m.def("factor_product_double_backward_cuda", &product_cuda<pysteep_factor_product_double_backward_cuda>, py::arg("product"),
        py::arg("device_index"), py::arg("stream"));
  m.def("factor_product_cuda_on_host", &product_cuda_on_host<pysteep_factor_product_cuda_on_host>, py::arg("product"));
  m.def("factor_product_backward_cuda_on_host", &product_cuda_on_host<pysteep_factor_product_backward_cuda_on_host>,
        py::arg("product"));
  m.def("factor_product_double_backward_cuda_on_host",
        &product_cuda_on_host<pysteep_factor_product_double_backward_cuda_on_host>, py::arg("product"));
#endif
}

}  // namespace pysteep
