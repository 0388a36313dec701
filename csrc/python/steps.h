// How a step rounds, as Python says it and as the C interface takes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pysteep/rounding.h"
#include "python/tensors.h"

namespace pysteep {

// What a call says of rounding; the last roles of its tensors hold the compensations.
struct Rounding {
  pysteep_rounding_mode mode;
  uint64_t seed;
  pysteep_scalar step;
  std::vector<uint32_t> stream;
  std::vector<int64_t> first;
};

// What pysteep_rounding points to.
struct RoundingView {
  std::vector<void*> compensations;
  size_t uncompensated;  // roles before those of the compensations
  pysteep_rounding rounding;

  // `rounded` roles have a compensation each.
  RoundingView(const Rounding& of_call, const Tensors& all, size_t rounded);
};

}  // namespace pysteep
