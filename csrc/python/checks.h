// What the Python module asks of its arguments before an op reads them, once a call: counts, dtype codes and sizes, so that a
// wrong list is an exception. Addresses are taken on trust.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pysteep/diagonal_flow.h"
#include "pysteep/factor_product.h"
#include "python/tensors.h"

namespace pysteep {

// Throws what Python sees as a ValueError.
inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("pysteep._csrc: ") + what);
}

inline void check_dtype(int code) {
  require(code >= PYSTEEP_FLOAT16 && code <= PYSTEEP_FLOAT64, "a dtype code must be 0 to 3");
}

inline void check_tensors(const std::vector<std::vector<int64_t>>& roles, const std::vector<int64_t>& numel,
                          const std::vector<int>& dtypes) {
  require(!roles.empty() && roles.size() == dtypes.size(), "there must be a role, and one dtype for each");
  for (const auto& addresses : roles)
    require(addresses.size() == numel.size(), "every role must have one address for each weight");
  for (int64_t elements : numel) require(elements >= 0, "numel must be >= 0");
  for (int dtype : dtypes) require(dtype >= PYSTEEP_FLOAT16 && dtype <= PYSTEEP_INT16, "a tensor's dtype code must be 0 to 4");
}

// The last `compensations` roles compensate the rounding of others.
inline void check_rounding(const Tensors& tensors, int mode, size_t streams, size_t firsts, size_t compensations) {
  require(mode >= PYSTEEP_NEAREST && mode <= PYSTEEP_COMPENSATED, "a mode of rounding must be 0 to 2");
  require(streams == tensors.numel.size() && firsts == streams, "stream and first must hold an entry for each weight");
  require(tensors.roles.size() >= 2 + compensations,
          "a step needs weights and gradients, and a compensation for each role that is rounded");
  for (size_t role = 0; role < tensors.roles.size(); ++role)
    require((tensors.roles[role].dtype == PYSTEEP_INT16) == (role + compensations >= tensors.roles.size()),
            "compensations, and nothing else, must be int16");
}

inline void check_steepest(const Tensors& tensors) { require(tensors.roles.size() >= 2, "a step needs weights and gradients"); }

inline void check_factors(const Tensors& tensors, int64_t stored, int64_t depth) {
  require(stored >= 1 && stored <= PYSTEEP_MAX_DEPTH && (stored == depth || (stored == 2 && depth > 2)),
          "as many factors must be stored as the depth, up to 64, or two");
  const size_t count = static_cast<size_t>(stored), roles = tensors.roles.size();
  require(roles >= 2 + count && (roles - 2) % count == 0, "a step needs weights, gradients and every stored factor");
}

inline void check_mirror(const Tensors& tensors, size_t balances, int64_t depth) {
  check_steepest(tensors);
  require(balances == tensors.numel.size(), "there must be one balance for each weight");
  require(depth >= 2 && depth <= PYSTEEP_MAX_DEPTH, "depth must be from 2 to 64");
}

inline void check_product(int64_t numel, int dtype, size_t factors, size_t tangents, size_t factor_gradients) {
  require(numel >= 0, "numel must be >= 0");
  check_dtype(dtype);
  require(factors >= 1 && factors <= PYSTEEP_MAX_DEPTH, "a product needs 1 to 64 factors");
  require(tangents == 0 || tangents == factors, "there must be one tangent for each factor, or none");
  require(factor_gradients == 0 || factor_gradients == factors, "there must be one result for each factor, or none");
}

inline void check_flows(const std::array<int64_t, 3>& sizes, int64_t batch_size, int loss, int dtype) {
  require(sizes[0] >= 0 && sizes[1] >= 0 && sizes[2] >= 0 && batch_size >= 0, "sizes of a flow must be >= 0");
  require(loss == PYSTEEP_MEAN_SQUARE || loss == PYSTEEP_EXPONENTIAL, "a loss must be 0 or 1");
  require(dtype == PYSTEEP_FLOAT32 || dtype == PYSTEEP_FLOAT64, "a flow's dtype code must be 2 or 3");
}

}  // namespace pysteep
