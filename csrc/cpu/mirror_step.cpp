// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/mirror_step.h.
#include "math/mirror_step.h"

#include "cpu/factor_blocks.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/steepest_blocks.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Tensors = pysteep_mirror_tensors;

// u(c) for each c; `u` may be `c`.
template <Power P, typename T>
void signed_powers(const T* c, int64_t n, const PowerExponent<T> exponent, T* u) {
  if constexpr (P == Power::general) {
    const Logarithms<T> logs(c, n);
    if (logs.normal) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P, Range::normal>(c[i], logs[i], exponent);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P, Range::any>(c[i], logs[i], exponent);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) u[i] = signed_power<P>(c[i], {}, exponent);
  }
}

// The next block of a weight and its gradient, fetched in parts between the loops over this one: a core waits for no more than
// a few lines of memory at once.
class NextBlock {
 public:
  NextBlock(const Tensors& tensors, int64_t tensor, int64_t begin) : tensors_(tensors), tensor_(tensor), begin_(begin) {}

  void fetch_part() {
    if (part_ == parts) return;
    const int64_t n = block_elements / parts, begin = begin_ + part_++ * n;
    prefetch_block(tensors_.weight[tensor_], tensors_.weight_dtype, begin, n);
    prefetch_block(tensors_.gradient[tensor_], tensors_.gradient_dtype, begin, n);
  }

 private:
  static constexpr int parts = 4;
  const Tensors& tensors_;
  int64_t tensor_, begin_;
  int part_ = 0;
};

// u(x) and u(g) of a block at general q. Two independent chains of operations in each loop keep a core busier than one, and
// logarithms and exponentials in one loop less so: see Logarithms.
template <typename T>
struct GeneralPowers {
  alignas(64) T of_x[block_elements], of_gradient[block_elements];

  GeneralPowers(const T* x, const T* gradient, int64_t n, const MirrorNumbers<T>& numbers, NextBlock& next) {
    next.fetch_part();
    const bool normal = fill_logarithms<Range::normal>(x, gradient, n, numbers.gradient_factor);
    if (!normal) fill_logarithms<Range::any>(x, gradient, n, numbers.gradient_factor);
    next.fetch_part();
    normal ? fill_powers<Range::normal>(x, gradient, n, numbers) : fill_powers<Range::any>(x, gradient, n, numbers);
    next.fetch_part();
  }

 private:
  alignas(64) T fraction_of_x_[block_elements], fraction_of_gradient_[block_elements];  // the whole parts where u will be

  template <Range R>
  bool fill_logarithms(const T* __restrict x, const T* __restrict gradient, int64_t n, T factor) {
    auto largest = Extent<T>().largest, smallest = Extent<T>().smallest;
#pragma omp simd reduction(max : largest) reduction(min : smallest)
    for (int64_t i = 0; i < n; ++i) {
      const T c = gradient[i] * factor;
      const Logarithm<T> first = logarithm<Power::general, R>(x[i]), second = logarithm<Power::general, R>(c);
      of_x[i] = first.whole;
      of_gradient[i] = second.whole;
      fraction_of_x_[i] = first.fraction;
      fraction_of_gradient_[i] = second.fraction;
      const auto size = Extent<T>::size(x[i]), other = Extent<T>::size(c);
      const auto larger = size > other ? size : other, smaller = size - 1 < other - 1 ? size - 1 : other - 1;
      largest = larger > largest ? larger : largest;
      smallest = smaller < smallest ? smaller : smallest;
    }
    return Extent<T>{largest, smallest}.is_normal();
  }

  template <Range R>
  void fill_powers(const T* __restrict x, const T* __restrict gradient, int64_t n, const MirrorNumbers<T> numbers) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T c = gradient[i] * numbers.gradient_factor;
      of_x[i] = signed_power<Power::general, R>(x[i], {of_x[i], fraction_of_x_[i]}, numbers.direction);
      of_gradient[i] = signed_power<Power::general, R>(c, {of_gradient[i], fraction_of_gradient_[i]}, numbers.direction);
    }
  }
};

// Calls step(u(x), direction) with u(g) for a direction at general q; else with room for u(x), and g, whose powers cost the
// loops over them less than a buffer does.
template <Power P, typename T, typename Step>
void with_powers(const T* x, const T* gradient, int64_t n, const MirrorNumbers<T>& numbers, NextBlock& next, const Step& step) {
  if constexpr (P == Power::general) {
    GeneralPowers<T> powers(x, gradient, n, numbers, next);
    step(powers.of_x, powers.of_gradient);
  } else {
    alignas(64) T of_x[block_elements];
    step(of_x, gradient);
  }
}

template <Power P, typename T>
PYSTEEP_INLINE T power_of_gradient(T direction, const MirrorNumbers<T>& numbers) {
  return P == Power::general ? direction : signed_power<P>(direction * numbers.gradient_factor, {}, {});
}

// Range::normal of mirror_step_two.
template <typename T>
bool squares_are_normal(const T* __restrict x, int64_t n, T balance) {
  using Unsigned = typename FloatBits<T>::Unsigned;
  Unsigned largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Unsigned size = Extent<T>::size(x[i]);
    largest = size > largest ? size : largest;
  }
  return largest < Extent<T>::size(T(0x1p60)) && balance > T(0x1p-60) && balance < T(0x1p60);
}

template <Power P, Range R, typename T>
void step_two(const T* __restrict of_x, const T* __restrict direction, int64_t n, const MirrorNumbers<T> numbers,
              T* __restrict x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T u = power_of_gradient<P>(direction[i], numbers);
    const T u_of_x = P == Power::general ? of_x[i] : signed_power<P>(x[i], {}, {});
    x[i] = mirror_step_two<R>(P, x[i], u_of_x, u, numbers);
  }
}

template <Power P, typename T>
void step_depth_two(T* __restrict x, const T* __restrict gradient, int64_t n, const MirrorNumbers<T> numbers, NextBlock& next) {
  with_powers<P>(x, gradient, n, numbers, next, [&](const T* of_x, const T* direction) {
    squares_are_normal(x, n, numbers.balance) ? step_two<P, Range::normal>(of_x, direction, n, numbers, x)
                                              : step_two<P, Range::any>(of_x, direction, n, numbers, x);
  });
}

// L - 1, a constant of loops for a `Depth` > 0.
template <int Depth>
PYSTEEP_INLINE int64_t others_of(int64_t depth) {
  return (Depth > 0 ? Depth : depth) - 1;
}

// The first guess of y, |x|^q, and u(x) unless it is there already.
template <Power P, typename T>
void begin_search(const T* __restrict x, int64_t n, const MirrorSearch<T> search, T* __restrict of_x, T* __restrict power_of_x,
                  T* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (P != Power::general) of_x[i] = signed_power<P>(x[i], {}, {});
    power_of_x[i] = magnitude(x[i] * of_x[i]);
    y[i] = mirror_first_guess(magnitude(x[i]), search);
  }
}

// One iteration; returns whether every y was close to its solution before it.
template <int Depth, int Bits, typename T>
bool iterate(const T* __restrict power_of_x, int64_t n, int64_t depth, const MirrorSearch<T> search, T* __restrict y) {
  auto farthest = mirror_nearness(T(0), T(1));
  T smallest = search.smallest;
#pragma omp simd reduction(max : farthest) reduction(min : smallest)
  for (int64_t i = 0; i < n; ++i) {
    const T excess = mirror_excess(y[i], integer_power<Bits>(y[i], others_of<Depth>(depth)), power_of_x[i], search);
    const auto nearness = mirror_nearness(excess, y[i]);
    farthest = nearness > farthest ? nearness : farthest;
    smallest = y[i] < smallest ? y[i] : smallest;
    y[i] = mirror_next(y[i], excess, search);
  }
  return farthest <= search.close && smallest == search.smallest;
}

// The solution from root = |x|^(q/L), in y on entry, where `iterate` does not find it: in units of the larger of root and
// balance.
template <int Depth, int Bits, typename T>
void solve_in_units(int64_t n, int64_t depth, const MirrorNumbers<T> numbers, T* __restrict y) {
  alignas(64) T low[block_elements], size_power[block_elements], r[block_elements];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T unit = mirror_unit(y[i], numbers), size = y[i] / unit;
    low[i] = numbers.balance / unit;
    size_power[i] = size * integer_power<Bits>(size, others_of<Depth>(depth));
    r[i] = mirror_guess(low[i], size_power[i], numbers);
  }
  bool close = false;
  for (int iteration = 0; iteration < mirror_iterations && !close; ++iteration) {
    T farthest = T(0);
#pragma omp simd reduction(max : farthest)
    for (int64_t i = 0; i < n; ++i) {
      const T next = mirror_halley(r[i], integer_power<Bits>(r[i], others_of<Depth>(depth)), low[i], size_power[i], numbers);
      const T move = magnitude(next - r[i]);
      farthest = move > farthest ? move : farthest;
      r[i] = next;
    }
    close = farthest <= numbers.close;
  }
  if (!close)
    for (int64_t i = 0; i < n; ++i) r[i] = mirror_safeguarded(r[i], low[i], size_power[i], depth, numbers);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = mirror_unit(y[i], numbers) * r[i];
}

// root = |x|^(q/L), which is y itself without a balance.
template <typename T>
void fill_roots(const T* __restrict x, int64_t n, const MirrorNumbers<T> numbers, T* __restrict root) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) root[i] = magnitude(x[i]);
  signed_powers<Power::general>(root, n, numbers.root, root);
}

template <Power P, int Depth, int Bits, typename T>
void move_all(const T* __restrict y, const T* __restrict of_x, const T* __restrict direction, int64_t n, int64_t depth,
              const MirrorNumbers<T> numbers, T* __restrict x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T u = power_of_gradient<P>(direction[i], numbers);
    const int64_t others = others_of<Depth>(depth);
    const T growth = relative_power<Bits>(mirror_relative_move(of_x[i], u, y[i], numbers), others);
    x[i] = mirror_moved(x[i], u, integer_power<Bits>(y[i], others), growth, numbers);
  }
}

template <Power P, int Depth, int Bits, typename T>
void step_deep(T* __restrict x, const T* __restrict gradient, int64_t n, int64_t depth, const MirrorNumbers<T> numbers,
               const MirrorSearch<T> search, NextBlock& next) {
  with_powers<P>(x, gradient, n, numbers, next, [&](T* of_x, const T* direction) {
    alignas(64) T power_of_x[block_elements], y[block_elements];
    bool close = false;
    if (numbers.balance > T(0)) {
      next.fetch_part();
      begin_search<P>(x, n, search, of_x, power_of_x, y);
      for (int iteration = 0; iteration < mirror_iterations && !close; ++iteration) {
        next.fetch_part();
        close = iterate<Depth, Bits>(power_of_x, n, depth, search, y);
      }
    }
    if (!close) {
      if constexpr (P != Power::general) signed_powers<P>(x, n, numbers.direction, of_x);
      fill_roots(x, n, numbers, y);
      if (numbers.balance > T(0)) solve_in_units<Depth, Bits>(n, depth, numbers, y);
    }
    next.fetch_part();
    move_all<P, Depth, Bits>(y, of_x, direction, n, depth, numbers, x);
  });
}

template <Power P, int Bits, typename T>
void step_of_bits(T* x, const T* gradient, int64_t n, int64_t depth, const MirrorNumbers<T>& numbers,
                  const MirrorSearch<T>& search, NextBlock& next) {
  if constexpr (Bits <= 5) {
    if (highest_bit(depth - 1) != Bits) return step_of_bits<P, Bits + 1>(x, gradient, n, depth, numbers, search, next);
    step_deep<P, 0, Bits>(x, gradient, n, depth, numbers, search, next);
  }
}

// Loops of their own for the depths that people use.
template <Power P, int Depth, typename T>
void step_of_depth(T* x, const T* gradient, int64_t n, int64_t depth, const MirrorNumbers<T>& numbers,
                   const MirrorSearch<T>& search, NextBlock& next) {
  if constexpr (Depth > 10) {
    step_of_bits<P, 3>(x, gradient, n, depth, numbers, search, next);
  } else {
    if (depth != Depth) return step_of_depth<P, Depth + 1>(x, gradient, n, depth, numbers, search, next);
    step_deep<P, Depth, (Depth > 8 ? 3 : Depth > 4 ? 2 : 1)>(x, gradient, n, depth, numbers, search, next);
  }
}

template <Power P, typename T>
void step_all(const Tensors& tensors, const pysteep_rounding& rounding, double q, const MirrorNumbers<T>& shared) {
  for_each_chunk(tensors.numel, tensors.count, [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
    const Rounder rounder = rounder_of(rounding, tensors.weight_dtype, tensor, tensors.count, 0);
    MirrorNumbers<T> numbers = shared;
    numbers.balance = T(*tensors.balance[tensor]);
    const MirrorSearch<T> search = mirror_search(q, tensors.depth, double(numbers.at_one), numbers.balance);
    for (int64_t at = begin; at < end; at += block_elements) {
      const int64_t n = at + block_elements < end ? block_elements : end - at;
      NextBlock next(tensors, tensor, at + n);
      RoundedBlock<T> weight(tensors.weight[tensor], tensors.weight_dtype, at, n, rounder);
      Block<T> gradient(tensors.gradient[tensor], tensors.gradient_dtype, at, n);
      tensors.depth == 2 ? step_depth_two<P>(weight.data(), gradient.data(), n, numbers, next)
                         : step_of_depth<P, 3>(weight.data(), gradient.data(), n, tensors.depth, numbers, search, next);
      weight.write_back();
    }
  });
}

}  // namespace

void mirror_step_cpu(const Tensors& tensors, const pysteep_steepest_options& options, const pysteep_rounding& rounding) {
  if (read(options.found_inf) != 0) return;
  const double at_one = mirror_at_one(tensors.depth);
  specialise_power(options.q, [&]<Power P>() {
    if (tensors.weight_dtype == PYSTEEP_FLOAT64)
      step_all<P>(tensors, rounding, options.q, mirror_numbers<double>(options, tensors.depth, at_one));
    else
      step_all<P>(tensors, rounding, options.q, mirror_numbers<float>(options, tensors.depth, at_one));
  });
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
