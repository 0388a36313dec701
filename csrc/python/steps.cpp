// What all steps take beside their tensors: options, and how to round.
#include "python/steps.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include "pysteep/steepest_step.h"
#include "python/bindings.h"
#include "python/checks.h"

namespace pysteep {

RoundingView::RoundingView(const Rounding& of_call, const Tensors& all, size_t rounded) {
  const bool compensated = of_call.mode == PYSTEEP_COMPENSATED, stochastic = of_call.mode == PYSTEEP_STOCHASTIC;
  check_rounding(all, of_call.mode, stochastic ? of_call.stream.size() : all.numel.size(),
                 stochastic ? of_call.first.size() : all.numel.size(), compensated ? rounded : 0);
  uncompensated = all.roles.size() - (compensated ? rounded : 0);
  for (size_t role = uncompensated; role < all.roles.size(); ++role)
    compensations.insert(compensations.end(), all.roles[role].addresses.begin(), all.roles[role].addresses.end());
  rounding = {of_call.mode, of_call.seed, of_call.step, of_call.stream.data(), of_call.first.data(), compensations.data()};
}

namespace {

// A number, or the address of a float32 or float64 on the device.
using Number = std::variant<double, std::pair<int64_t, int>>;

pysteep_scalar scalar(const Number& number) {
  if (const double* value = std::get_if<double>(&number)) return {*value, nullptr, PYSTEEP_FLOAT64};
  const auto& [address, dtype] = std::get<1>(number);
  require(dtype == PYSTEEP_FLOAT32 || dtype == PYSTEEP_FLOAT64, "a number's dtype code must be 2 or 3");
  return {0.0, reinterpret_cast<const void*>(address), static_cast<pysteep_dtype>(dtype)};
}

Rounding rounding(int mode, uint64_t seed, const Number& step, std::vector<uint32_t> stream, std::vector<int64_t> first) {
  return {static_cast<pysteep_rounding_mode>(mode), seed, scalar(step), std::move(stream), std::move(first)};
}

pysteep_steepest_options options(double q, const Number& beta1, const Number& beta2, double weight_decay,
                                 double coupled_weight_decay, bool maximize, const Number& lr, const Number& step_scale,
                                 const Number& grad_scale, const Number& found_inf) {
  return {q,          weight_decay,       coupled_weight_decay, maximize ? 1 : 0, scalar(beta1), scalar(beta2),
          scalar(lr), scalar(step_scale), scalar(grad_scale),   scalar(found_inf)};
}

}  // namespace

void register_steps(py::module_& m) {
  py::class_<pysteep_steepest_options>(m, "SteepestOptions")
      .def(py::init(&options), py::arg("q"), py::arg("beta1"), py::arg("beta2"), py::arg("weight_decay"),
           py::arg("coupled_weight_decay"), py::arg("maximize"), py::arg("lr"), py::arg("step_scale"), py::arg("grad_scale"),
           py::arg("found_inf"));
  py::class_<Rounding>(m, "Rounding")
      .def(py::init(&rounding), py::arg("mode"), py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first"));
}

}  // namespace pysteep
