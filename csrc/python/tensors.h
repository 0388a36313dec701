// Many tensors a call, as the C interface takes them: addresses, element counts, one dtype a role.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pysteep/tensors.h"
#include "python/dlpack.h"

namespace pysteep {

struct Role {
  std::vector<void*> addresses;
  pysteep_dtype dtype = PYSTEEP_FLOAT32;
};

struct Tensors {
  std::vector<Role> roles;  // the weights, the gradients, and what else the op takes, in the order of its C interface
  std::vector<int64_t> numel;
  dlpack::Device device{dlpack::cpu, 0};
};

inline std::optional<pysteep_dtype> dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == dlpack::brain_floating && type.bits == 16) return PYSTEEP_BFLOAT16;
  if (type.code == dlpack::integer && type.bits == 16) return PYSTEEP_INT16;
  if (type.code != dlpack::floating) return std::nullopt;
  if (type.bits == 16) return PYSTEEP_FLOAT16;
  if (type.bits == 32) return PYSTEEP_FLOAT32;
  if (type.bits == 64) return PYSTEEP_FLOAT64;
  return std::nullopt;
}

inline int64_t numel_of(const dlpack::Tensor& tensor) {
  int64_t numel = 1;
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) numel *= tensor.shape[dim];
  return numel;
}

// Whether the tensor fills one block of memory without gaps or overlap, in any order of its dimensions.
inline bool is_dense(const dlpack::Tensor& tensor) {
  const int64_t numel = numel_of(tensor);
  for (int64_t filled = 1; filled < numel;) {
    int64_t extent = 0;  // of the dimension that continues what is filled so far
    for (int32_t dim = tensor.ndim - 1; dim >= 0 && extent == 0; --dim)
      if (tensor.shape[dim] > 1 && tensor.strides[dim] == filled) extent = tensor.shape[dim];
    if (extent == 0) return false;
    filled *= extent;
  }
  return true;
}

inline bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t dim = 0; dim < a.ndim; ++dim)
    if (a.shape[dim] != b.shape[dim] || (a.shape[dim] != 1 && a.strides[dim] != b.strides[dim])) return false;
  return true;
}

}  // namespace pysteep
