// factor_step on NVIDIA GPUs. The arithmetic is in math/factor_step.h.
#include "cuda/launch.h"
#include "cuda/rounding.h"
#include "cuda/vectors.h"
#include "math/factor_step.h"
#include "pysteep/factor_product.h"
#include "pysteep/factor_step.h"

namespace pysteep::cuda {
namespace {

using Tensors = pysteep_factor_tensors;

struct Options {
  pysteep_steepest_options each;
  int64_t depth;
  int32_t stored, highest_bit;  // of depth - 2
  bool tied;
  pysteep_dtype weight, gradient;
};
// The rows are weight, gradient, `stored` factors, as many momenta or none. At 64 factors and momenta 24 weights a launch, 16
// with compensations.
using FactorTable = Table<Options, 512, 3200>;

// The factors that a thread holds at once, so that they are on their way together. More than `many` come in groups of `few`; so
// do more than two that are not rounded to the nearest, of which registers hold fewer.
constexpr int two = 2, few = 4, many = 10;

template <typename F>
constexpr int64_t chunk_elements = int64_t(threads_per_block) * vector_elements<F>;

// Weight and gradient, two operands beside many, are of any type; accesses to them may be of less than 16 bytes, by
// neighbouring threads to neighbouring addresses all the same.
template <typename F, typename M, int C, bool Rounds>
struct Step {
  using T = compute_t<F>;
  using Rounding = Rounder<Rounds, FactorTable>;
  using Beside = typename Rounding::Beside;
  // Elements of a vector, and how many of them are stepped side by side: the more, the more code, the fewer moves of registers.
  static constexpr int n = vector_elements<F>, side = C == two ? n : at_hand<F, n>;
  static constexpr bool momenta = has_momentum<M>, grouped = C == few;
  const FactorTable& table;
  const FactorNumbers<T> numbers;
  const Power power;
  const Rounding rounding;

  // Up to C factors of n elements (or of one, then that many times).
  struct Group {
    Turning<F, n, side> factor[C];
    Turning<M, n, side> momentum[momenta ? C : 1];
    Turning<Beside, n, side> beside[Rounds ? C : 1];  // the factors: cuda/rounding.h
    Turning<T, n, side> head, behind;                 // products of the old factors before and behind the group
    Turning<T, n, side> product;                      // of the new ones before it
  };

  template <typename S>
  static PYSTEEP_INLINE Turning<S, n, side> load_operand(const void* address, int64_t at, bool vector) {
    return vector ? Turning<S, n, side>(load<S, n>(address, at))
                  : Turning<S, n, side>::of_one(load<S, 1>(address, at).element[0]);
  }
  template <typename S>
  static PYSTEEP_INLINE void store_operand(const Turning<S, n, side>& operand, void* address, int64_t at, bool vector) {
    if (vector)
      store(operand.vector(), address, at);
    else
      store(Vector<S, 1>{operand.get(0)}, address, at);
  }

  PYSTEEP_INLINE Turning<uint16_t, n, side> load_compensation(int tensor, int k, int64_t at, bool vector) const {
    using Result = Turning<uint16_t, n, side>;
    return vector ? Result(rounding.template load_compensation<n>(tensor, k, at))
                  : Result::of_one(rounding.template load_compensation<1>(tensor, k, at).element[0]);
  }
  PYSTEEP_INLINE void draw(Turning<uint16_t, n, side>& beside, int tensor, int k, int64_t at, bool vector) const {
    Vector<uint16_t, n> drawn = beside.vector();
    Vector<uint16_t, 1> one{beside.get(0)};
    if (vector)
      rounding.draw(drawn, tensor, k, at);
    else
      rounding.draw(one, tensor, k, at);
    beside = vector ? Turning<uint16_t, n, side>(drawn) : Turning<uint16_t, n, side>::of_one(one.element[0]);
  }
  PYSTEEP_INLINE void store_compensation(const Turning<uint16_t, n, side>& beside, int tensor, int k, int64_t at,
                                         bool vector) const {
    if (vector)
      rounding.store_compensation(beside.vector(), tensor, k, at);
    else
      rounding.store_compensation(Vector<uint16_t, 1>{beside.get(0)}, tensor, k, at);
  }

  // Element i of factor k of the group.
  PYSTEEP_INLINE T value(const Group& group, int k, int i) const {
    if constexpr (Rounds)
      return rounding.widen(group.factor[k].get(i), group.beside[k].get(i));
    else
      return widen(group.factor[k].get(i));
  }

  PYSTEEP_INLINE void load_group(Group& group, int tensor, int start, int64_t at, bool vector) const {
    const int stored = table.options.stored;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      F one;
      narrow(T(1), one);
      group.factor[k] = group.factor[k].filled(one);
      if constexpr (Rounds) group.beside[k] = group.beside[k].filled(0);
      if (start + k >= stored) continue;
      group.factor[k] = load_operand<F>(table.at<F>(2 + start + k, tensor), at, vector);
      if constexpr (momenta) group.momentum[k] = load_operand<M>(table.at<M>(2 + stored + start + k, tensor), at, vector);
      if constexpr (Rounds) group.beside[k] = load_compensation(tensor, start + k, at, vector);
    }
    if constexpr (Rounds) {
#pragma unroll
      for (int k = 0; k < C; ++k)
        if (start + k < stored) draw(group.beside[k], tensor, start + k, at, vector);
    }
  }
  PYSTEEP_INLINE void store_group(const Group& group, int tensor, int start, int64_t at, bool vector) const {
    const int stored = table.options.stored;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if (start + k >= stored) continue;
      store_operand(group.factor[k], table.at<F>(2 + start + k, tensor), at, vector);
      if constexpr (momenta) store_operand(group.momentum[k], table.at<M>(2 + stored + start + k, tensor), at, vector);
      if constexpr (Rounds) store_compensation(group.beside[k], tensor, start + k, at, vector);
    }
  }

  // Formed anew for each group, from values that the thread will read again and then finds in a cache: local memory would hold
  // them no nearer.
  PYSTEEP_INLINE void load_behind(Group& group, int tensor, int start, int64_t at, bool vector) const {
    Vector<T, n> behind;
#pragma unroll
    for (int i = 0; i < n; ++i) behind.element[i] = 1;
#pragma unroll 2
    for (int k = table.options.stored - 1; k >= start + C; --k) {
      const Vector<F, n> factor = load_operand<F>(table.at<F>(2 + k, tensor), at, vector).vector();
      Vector<Beside, Rounds ? n : 1> beside;
      if constexpr (Rounds) beside = load_compensation(tensor, k, at, vector).vector();
#pragma unroll
      for (int i = 0; i < n; ++i)
        behind.element[i] = rounding.widen(factor.element[i], beside.element[Rounds ? i : 0]) * behind.element[i];
    }
    group.behind = decltype(group.behind)(behind);
  }

  PYSTEEP_INLINE void load_gradient(Group& group, int tensor, int64_t at, bool vector) const {
    const void* address = table.at<const void>(1, tensor);
    Vector<T, n> g;
    if (vector)
      g = load_widened<T, n>(table.options.gradient, address, at);
    else
      g.element[0] = load_widened<T, 1>(table.options.gradient, address, at).element[0];
#pragma unroll
    for (int i = 0; i < n; ++i) g.element[i] = (vector ? g.element[i] : g.element[0]) * numbers.gradient_factor;
    group.head = decltype(group.head)(g);
  }

  // Tied: the product of all factors but two, rest^(depth - 2).
  template <int N>
  PYSTEEP_INLINE void others_of(const Group& group, T (&others)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) others[i] = value(group, 1, i);
#pragma unroll 1
    for (int bit = table.options.highest_bit - 1; bit >= 0; --bit) {
      const bool times_rest = ((table.options.depth - 2) >> bit & 1) != 0;
#pragma unroll
      for (int i = 0; i < N; ++i) others[i] = squared_times(others[i], value(group, 1, i), times_rest);
    }
  }

  template <int N>
  PYSTEEP_INLINE void find_gradients(Group& group, T (&g)[C][N]) const {
    if constexpr (C == two) {
      if (table.options.tied) {
        T others[N];
        others_of(group, others);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const T first = value(group, 0, i), rest = value(group, 1, i);
          g[0][i] = tied_gradient_of_first(group.head.get(i), rest, others[i]);
          g[1][i] = tied_gradient_of_rest(group.head.get(i), first, others[i]);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T head = group.head.get(i), tail = grouped ? group.behind.get(i) : T(1);
#pragma unroll
      for (int k = C - 1; k >= 0; --k) {
        g[k][i] = tail;
        tail = value(group, k, i) * tail;
      }
#pragma unroll
      for (int k = 0; k < C; ++k) {
        g[k][i] = factor_gradient(head, g[k][i]);
        head = head * value(group, k, i);
      }
      if constexpr (grouped) group.head.set(i, head);
    }
  }

  template <Power P, int N>
  PYSTEEP_INLINE void step_factors(Group& group, int start, const T (&g)[C][N]) const {
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if (start + k >= table.options.stored) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T w = value(group, k, i), m = 0;
        if constexpr (momenta) m = widen(group.momentum[k].get(i));
        const T c = steepest_direction<momenta>(w, g[k][i], m, numbers.each);
        steepest_step<momenta>(w, g[k][i], m, signed_power<P>(c, logarithm<P>(c), numbers.each.exponent), numbers.each);
        F stored;
        Beside beside;
        if constexpr (Rounds) beside = group.beside[k].get(i);
        rounding.narrow(w, stored, beside);
        if constexpr (Rounds) group.beside[k].set(i, beside);
        group.factor[k].set(i, stored);
        if constexpr (momenta) {
          M stored_momentum;
          narrow(m, stored_momentum);
          group.momentum[k].set(i, stored_momentum);
        }
      }
    }
  }

  template <int N>
  PYSTEEP_INLINE void multiply_factors(Group& group) const {
    if constexpr (C == two) {
      if (table.options.tied) {
        T others[N];
        others_of(group, others);
#pragma unroll
        for (int i = 0; i < N; ++i) group.head.set(i, tied_product(value(group, 0, i), value(group, 1, i), others[i]));
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T x = grouped ? group.product.get(i) : T(1);
#pragma unroll
      for (int k = 0; k < C; ++k) x = x * value(group, k, i);
      (grouped ? group.product : group.head).set(i, x);  // of a single group the head has been used
    }
  }

  // The first N of the elements at hand.
  template <int N>
  PYSTEEP_INLINE void step_at_hand(Group& group, int start) const {
    T g[C][N];
    find_gradients(group, g);
    switch (power) {
      case Power::sign:
        step_factors<Power::sign>(group, start, g);
        break;
      case Power::root:
        step_factors<Power::root>(group, start, g);
        break;
      case Power::identity:
        step_factors<Power::identity>(group, start, g);
        break;
      case Power::general:
        step_factors<Power::general>(group, start, g);
        break;
    }
    multiply_factors<N>(group);
  }

  PYSTEEP_INLINE void step_group(Group& group, int start, bool vector) const {
    if constexpr (side == n) {
      vector ? step_at_hand<n>(group, start) : step_at_hand<1>(group, start);
    } else {
#pragma unroll 1
      for (int turn = 0; turn < n / side; ++turn) {
        step_at_hand<side>(group, start);
        if (!vector) break;
        group.head.turn();
        if constexpr (grouped) group.behind.turn();
        if constexpr (grouped) group.product.turn();
#pragma unroll
        for (int k = 0; k < C; ++k) {
          group.factor[k].turn();
          if constexpr (momenta) group.momentum[k].turn();
          if constexpr (Rounds) group.beside[k].turn();
        }
      }
    }
  }

  // The elements from `at` on, n of them, or one.
  PYSTEEP_INLINE void step_elements(int tensor, int64_t at, bool vector) const {
    Group group;
    group.product = group.product.filled(1);
#pragma unroll 1
    for (int start = 0; start < (grouped ? table.options.stored : 1); start += C) {
      load_group(group, tensor, start, at, vector);
      if (start == 0) load_gradient(group, tensor, at, vector);  // after the factors, which are on their way while this waits
      if constexpr (grouped) load_behind(group, tensor, start, at, vector);
      step_group(group, start, vector);
      store_group(group, forgotten(tensor), start, at, vector);
    }
    const Turning<T, n, side>& x = grouped ? group.product : group.head;
    void* weight = table.at<void>(0, tensor);
    if (vector)
      store_narrowed<T, n>(table.options.weight, x.vector(), weight, at);
    else
      store_narrowed<T, 1>(table.options.weight, {x.get(0)}, weight, at);
  }
};

template <typename F, typename M, int C, bool Rounds>
PYSTEEP_INLINE void factor_step_body(const FactorTable& table, int block, int thread, int grid) {
  const pysteep_steepest_options& options = table.options.each;
  if (read(options.found_inf) != 0) return;
  FactorNumbers<compute_t<F>> numbers = factor_numbers<compute_t<F>>(options);
  PowerExponent<compute_t<F>>& exponent = numbers.each.exponent;
  exponent = {forgotten(exponent.full), forgotten(exponent.high), forgotten(exponent.low)};  // else rounded for each element
  const Step<F, M, C, Rounds> step{table, numbers, power_of(options.q), Rounder<Rounds, FactorTable>(table)};
  for_each_chunk<chunk_elements<F>>(table, block, grid, [&](const Chunk& chunk) {
    int64_t at = chunk.begin + int64_t(thread) * (chunk.full ? vector_elements<F> : 1);
    const int64_t stride = chunk.full ? chunk_elements<F> : threads_per_block;
#pragma unroll 1
    for (; at < chunk.end; at += stride) step.step_elements(chunk.tensor, at, chunk.full);
  });
}

template <typename F, typename M, int C, bool Rounds>
__global__ void __launch_bounds__(threads_per_block, C <= (Rounds ? two : few) ? 2 : 1)
    factor_step_kernel(const __grid_constant__ FactorTable table) {
  factor_step_body<F, M, C, Rounds>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

// A call beside its tensors.
struct Call {
  Options options;
  const pysteep_rounding* rounding;  // null: to the nearest
  Where where;
};

template <typename F, typename M, int C, bool Rounds>
cudaError_t run_all(const Tensors& tensors, const Call& call) {
  const auto address = [&](int row, int64_t tensor) -> const void* {
    if (row < 2) return row == 0 ? tensors.weight[tensor] : tensors.gradient[tensor];
    const int64_t k = row - 2;
    return k < tensors.stored ? tensors.factor[k * tensors.count + tensor]
                              : tensors.momentum[(k - tensors.stored) * tensors.count + tensor];
  };
  const int stored = call.options.stored;
  return for_each_table<FactorTable, chunk_elements<F>>(
      call.options, tensors.count, tensors.numel, 2 + stored * (has_momentum<M> ? 2 : 1), address,
      [&](const FactorTable& table) {
        const auto body = [&](int block, int thread, int grid) {
          factor_step_body<F, M, C, Rounds>(table, block, thread, grid);
        };
        return launch(factor_step_kernel<F, M, C, Rounds>, body, grid_blocks(call.where, table.chunks), call.where, table);
      },
      call.rounding, stored);
}

template <typename F, typename M, bool Rounds>
cudaError_t run_stored(const Tensors& tensors, const Call& call) {
  const int stored = call.options.stored;
  if (stored <= two) return run_all<F, M, two, Rounds>(tensors, call);
  if constexpr (!Rounds)
    if (stored > few && stored <= many) return run_all<F, M, many, Rounds>(tensors, call);
  return run_all<F, M, few, Rounds>(tensors, call);
}

template <typename F, typename M>
cudaError_t run_rounding(const Tensors& tensors, const Call& call) {
  if constexpr (sizeof(F) == 2)
    if (call.rounding != nullptr) return run_stored<F, M, true>(tensors, call);
  return run_stored<F, M, false>(tensors, call);
}

template <typename F>
cudaError_t run_momentum(const Tensors& tensors, const Call& call) {
  if (tensors.momentum == nullptr) return run_rounding<F, None>(tensors, call);
  return tensors.momentum_dtype == tensors.factor_dtype ? run_rounding<F, F>(tensors, call) : cudaErrorInvalidValue;
}

cudaError_t run(const Tensors& tensors, const pysteep_steepest_options& options, const pysteep_rounding& rounding,
                const Where& where) {
  const auto fits = [&](pysteep_dtype dtype) {
    return dtype == tensors.weight_dtype || (dtype == PYSTEEP_FLOAT32 && tensors.weight_dtype != PYSTEEP_FLOAT64);
  };
  const bool full = tensors.stored == tensors.depth && tensors.depth >= 1 && tensors.depth <= PYSTEEP_MAX_DEPTH;
  const bool tied = tensors.stored == 2 && tensors.depth > 2;
  if (!fits(tensors.gradient_dtype) || !fits(tensors.factor_dtype) || !(full || tied)) return cudaErrorInvalidValue;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  const Options all{options,
                    tensors.depth,
                    static_cast<int32_t>(tensors.stored),
                    tied ? highest_bit(tensors.depth - 2) : 0,
                    tied,
                    tensors.weight_dtype,
                    tensors.gradient_dtype};
  const Call call{all, other_than_nearest(&rounding, tensors.factor_dtype), where};
  switch (tensors.factor_dtype) {
    case PYSTEEP_FLOAT16:
      return run_momentum<float16>(tensors, call);
    case PYSTEEP_BFLOAT16:
      return run_momentum<bfloat16>(tensors, call);
    case PYSTEEP_FLOAT32:
      return run_momentum<float>(tensors, call);
    case PYSTEEP_FLOAT64:
      return run_momentum<double>(tensors, call);
    case PYSTEEP_INT16:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pysteep::cuda

extern "C" {

int pysteep_factor_step_cuda(const pysteep_factor_tensors* tensors, const pysteep_steepest_options* options,
                             const pysteep_rounding* rounding, int device, void* stream) {
  return pysteep::cuda::run(*tensors, *options, *rounding, {false, device, static_cast<cudaStream_t>(stream)});
}

int pysteep_factor_step_cuda_on_host(const pysteep_factor_tensors* tensors, const pysteep_steepest_options* options,
                                     const pysteep_rounding* rounding) {
  return pysteep::cuda::run(*tensors, *options, *rounding, {true, 0, nullptr});
}

}  // extern "C"
