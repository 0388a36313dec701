// factor_product and its derivatives on NVIDIA GPUs. The arithmetic is in math/factor_product.h.
#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "math/factor_product.h"
#include "pysteep/factor_product.h"

namespace pysteep::cuda {
namespace {

using Tensors = pysteep_product_tensors;

struct Options {
  int32_t depth;
};
using ProductTable = Table<Options, 1, 2 + 3 * PYSTEEP_MAX_DEPTH>;  // one weight

// The rows of the table; of the last three roles there are `depth` each. What an op does not use is null.
constexpr int gradient_row = 0, result_row = 1, factor_row = 2;
PYSTEEP_INLINE int tangent_row(int depth) { return factor_row + depth; }
PYSTEEP_INLINE int factor_gradient_row(int depth) { return factor_row + 2 * depth; }

template <typename S>
constexpr int64_t chunk_elements = int64_t(threads_per_block) * vector_elements<S>;

// Calls visit.template operator()<n>(at) for every n elements of the block's chunks.
template <typename S, typename Visit>
PYSTEEP_INLINE void for_each_vector(const ProductTable& table, int block, int thread, int grid, const Visit& visit) {
  for_each_chunk<chunk_elements<S>>(table, block, grid, [&](const Chunk& chunk) {
    if (chunk.full) {
      visit.template operator()<vector_elements<S>>(chunk.begin + int64_t(thread) * vector_elements<S>);
    } else {
#pragma unroll 1
      for (int64_t at = chunk.begin + thread; at < chunk.end; at += threads_per_block) visit.template operator()<1>(at);
    }
  });
}

// The factors that a thread holds at once, so that they are on their way together. More than `many` come in groups of `few`;
// what a group lacks is filled with factors of 1, which change no bit.
constexpr int few = 4, many = 10;

template <typename S, int N>
using Operand = Turning<S, N, at_hand<S, N>>;
template <typename S, int N>
using Number = Turning<compute_t<S>, N, at_hand<S, N>>;  // in the compute type

// Factors (or tangents) [start, start + C) that there are, from the row of the first; `fill` for the others.
template <int C, typename S, int N>
PYSTEEP_INLINE void load_group(const ProductTable& table, int row, int start, int64_t at, compute_t<S> fill,
                               Operand<S, N> (&group)[C]) {
  S filler;
  narrow(fill, filler);
#pragma unroll
  for (int k = 0; k < C; ++k) {
    if (start + k < table.options.depth)
      group[k] = Operand<S, N>(load<S, N>(table.at<const S>(row + start + k, 0), at));
    else
      group[k] = Operand<S, N>::filled(filler);
  }
}

template <int C, typename S, int N>
PYSTEEP_INLINE void store_group(const ProductTable& table, int row, int start, int64_t at, const Operand<S, N> (&group)[C]) {
#pragma unroll
  for (int k = 0; k < C; ++k)
    if (start + k < table.options.depth) store(group[k].vector(), table.at<S>(row + start + k, 0), at);
}

template <typename S>
struct Forward {
  static constexpr int C = few;
  const ProductTable& table;

  template <int N>
  PYSTEEP_INLINE void operator()(int64_t at) const {
    compute_t<S> product[N];
#pragma unroll
    for (int i = 0; i < N; ++i) product[i] = 1;
#pragma unroll 1
    for (int start = 0; start < table.options.depth; start += C) {
      Operand<S, N> w[C];
      load_group(table, factor_row, start, at, 1, w);
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const Vector<S, N> factor = w[k].vector();
#pragma unroll
        for (int i = 0; i < N; ++i) product[i] = product[i] * widen(factor.element[i]);
      }
    }
    Vector<S, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(product[i], result.element[i]);
    store(result, table.at<S>(result_row, 0), at);
  }
};

// The product of the factors behind a group is formed anew for each group, from values that the thread will read again and then
// finds in a cache: local memory would hold them no nearer.
template <typename S, int C>
struct Backward {
  using T = compute_t<S>;
  static constexpr bool grouped = C == few;
  const ProductTable& table;

  template <int N>
  PYSTEEP_INLINE void operator()(int64_t at) const {
    constexpr int step = at_hand<S, N>;
    const int depth = table.options.depth;
    const Vector<S, N> gradient = load<S, N>(table.at<const S>(gradient_row, 0), at);
    Vector<T, N> head;
#pragma unroll
    for (int i = 0; i < N; ++i) head.element[i] = widen(gradient.element[i]);
    Number<S, N> heads(head);
#pragma unroll 1
    for (int start = 0; start < (grouped ? depth : 1); start += C) {
      Operand<S, N> w[C];
      load_group(table, factor_row, start, at, 1, w);
      Vector<T, N> behind;
#pragma unroll
      for (int i = 0; i < N; ++i) behind.element[i] = 1;
#pragma unroll 2
      for (int k = depth - 1; grouped && k >= start + C; --k) {
        const Vector<S, N> factor = load<S, N>(table.at<const S>(factor_row + k, 0), at);
#pragma unroll
        for (int i = 0; i < N; ++i) behind.element[i] = widen(factor.element[i]) * behind.element[i];
      }
      Number<S, N> tails(behind);
#pragma unroll(grouped ? N : 1)
      for (int turn = 0; turn < N / step; ++turn) {
#pragma unroll
        for (int i = 0; i < step; ++i) {
          T tail[C], head = heads.get(i);
          tail[C - 1] = tails.get(i);
#pragma unroll
          for (int k = C - 1; k > 0; --k) tail[k - 1] = widen(w[k].get(i)) * tail[k];
#pragma unroll
          for (int k = 0; k < C; ++k) {
            const T factor = widen(w[k].get(i));
            S result;
            narrow(factor_gradient(head, tail[k]), result);
            w[k].set(i, result);
            head = head * factor;
          }
          if (grouped) heads.set(i, head);
        }
        heads.turn();
        tails.turn();
#pragma unroll
        for (int k = 0; k < C; ++k) w[k].turn();
      }
      store_group(table, factor_gradient_row(depth), start, at, w);
    }
  }
};

template <typename S, int C>
struct DoubleBackward {
  using T = compute_t<S>;
  static constexpr bool grouped = C == few;
  const ProductTable& table;

  template <int N>
  PYSTEEP_INLINE void operator()(int64_t at) const {
    constexpr int step = at_hand<S, N>;
    const int depth = table.options.depth;
    Operand<S, N> gradients(load<S, N>(table.at<const S>(gradient_row, 0), at));
    Number<S, N> heads = Number<S, N>::filled(1), head_tangents = Number<S, N>::filled(0);
#pragma unroll 1
    for (int start = 0; start < (grouped ? depth : 1); start += C) {
      Operand<S, N> w[C], v[C];
      load_group(table, factor_row, start, at, 1, w);
      load_group(table, tangent_row(depth), start, at, 0, v);
      Vector<T, N> behind, tangent_behind;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        behind.element[i] = 1;
        tangent_behind.element[i] = 0;
      }
#pragma unroll 2
      for (int k = depth - 1; grouped && k >= start + C; --k) {
        const Vector<S, N> factor = load<S, N>(table.at<const S>(factor_row + k, 0), at);
        const Vector<S, N> tangent = load<S, N>(table.at<const S>(tangent_row(depth) + k, 0), at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const Dual<T> product = Dual<T>{widen(factor.element[i]), widen(tangent.element[i])} *
                                  Dual<T>{behind.element[i], tangent_behind.element[i]};
          behind.element[i] = product.value;
          tangent_behind.element[i] = product.tangent;
        }
      }
      Number<S, N> tails(behind), tail_tangents(tangent_behind);
#pragma unroll 1
      for (int turn = 0; turn < N / step; ++turn) {
#pragma unroll
        for (int i = 0; i < step; ++i) {
          const auto dual = [&](int k) { return Dual<T>{widen(w[k].get(i)), widen(v[k].get(i))}; };
          Dual<T> tail[C], head = {1, 0};
          if (grouped) head = {heads.get(i), head_tangents.get(i)};
          tail[C - 1] = {tails.get(i), tail_tangents.get(i)};
#pragma unroll
          for (int k = C - 1; k > 0; --k) tail[k - 1] = dual(k) * tail[k];
#pragma unroll
          for (int k = 0; k < C; ++k) {
            const Dual<T> next = head * dual(k);
            S result;
            narrow(factor_second_gradient(T(widen(gradients.get(i))), head, tail[k]), result);
            w[k].set(i, result);
            if (start + k < depth) head = next;  // times (1, 0) the tangent of an infinity would become NaN, and -0 become 0
          }
          if (grouped) heads.set(i, head.value);
          head_tangents.set(i, head.tangent);
        }
        heads.turn();
        head_tangents.turn();
        tails.turn();
        tail_tangents.turn();
        gradients.turn();
#pragma unroll
        for (int k = 0; k < C; ++k) {
          w[k].turn();
          v[k].turn();
        }
      }
      store_group(table, factor_gradient_row(depth), start, at, w);
    }
    Vector<S, N> result;
    const Vector<T, N> tangent = head_tangents.vector();
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(tangent.element[i], result.element[i]);
    store(result, table.at<S>(result_row, 0), at);
  }
};

template <typename S, typename Visit>
PYSTEEP_INLINE void product_body(const ProductTable& table, int block, int thread, int grid) {
  for_each_vector<S>(table, block, thread, grid, Visit{table});
}

template <typename S, typename Visit>
__global__ void __launch_bounds__(threads_per_block, 1) factor_product_kernel(const __grid_constant__ ProductTable table) {
  product_body<S, Visit>(table, blockIdx.x, threadIdx.x, gridDim.x);
}

enum class Op { forward, backward, double_backward };

template <Op op>
const void* address(const Tensors& tensors, int row) {
  if (row == gradient_row) return op == Op::forward ? nullptr : tensors.gradient;
  if (row == result_row) return op == Op::backward ? nullptr : tensors.result;
  const int depth = static_cast<int>(tensors.depth), k = (row - factor_row) % depth;
  if (row < tangent_row(depth)) return tensors.factor[k];
  if (row < factor_gradient_row(depth)) return op == Op::double_backward ? tensors.tangent[k] : nullptr;
  return op == Op::forward ? nullptr : tensors.factor_gradient[k];
}

template <Op op, typename S, typename Visit>
cudaError_t run_all(const Tensors& tensors, const Where& where) {
  const int depth = static_cast<int>(tensors.depth);
  return for_each_table<ProductTable, chunk_elements<S>>(
      Options{depth}, 1, &tensors.numel, 2 + 3 * depth, [&](int row, int64_t) { return address<op>(tensors, row); },
      [&](const ProductTable& table) {
        const auto body = [&](int block, int thread, int grid) { product_body<S, Visit>(table, block, thread, grid); };
        return launch(factor_product_kernel<S, Visit>, body, grid_blocks(where, table.chunks), where, table);
      });
}

template <Op op, typename S>
cudaError_t run_op(const Tensors& tensors, const Where& where) {
  const bool one_group = tensors.depth > few && tensors.depth <= many;
  if constexpr (op == Op::forward)
    return run_all<op, S, Forward<S>>(tensors, where);
  else if constexpr (op == Op::backward)
    return one_group ? run_all<op, S, Backward<S, many>>(tensors, where) : run_all<op, S, Backward<S, few>>(tensors, where);
  else
    return one_group ? run_all<op, S, DoubleBackward<S, many>>(tensors, where)
                     : run_all<op, S, DoubleBackward<S, few>>(tensors, where);
}

template <Op op>
cudaError_t run(const Tensors& tensors, const Where& where) {
  if (tensors.depth < 1 || tensors.depth > PYSTEEP_MAX_DEPTH) return cudaErrorInvalidValue;
  if (const cudaError_t error = select_device(where); error != cudaSuccess) return error;
  switch (tensors.dtype) {
    case PYSTEEP_FLOAT16:
      return run_op<op, float16>(tensors, where);
    case PYSTEEP_BFLOAT16:
      return run_op<op, bfloat16>(tensors, where);
    case PYSTEEP_FLOAT32:
      return run_op<op, float>(tensors, where);
    case PYSTEEP_FLOAT64:
      return run_op<op, double>(tensors, where);
  }
  return cudaErrorInvalidValue;
}

template <Op op>
int on_device(const Tensors& tensors, int device, void* stream) {
  return run<op>(tensors, {false, device, static_cast<cudaStream_t>(stream)});
}

template <Op op>
int on_host(const Tensors& tensors) {
  return run<op>(tensors, {true, 0, nullptr});
}

}  // namespace
}  // namespace pysteep::cuda

using pysteep::cuda::Op;

extern "C" {

int pysteep_factor_product_cuda(const pysteep_product_tensors* tensors, int device, void* stream) {
  return pysteep::cuda::on_device<Op::forward>(*tensors, device, stream);
}

int pysteep_factor_product_backward_cuda(const pysteep_product_tensors* tensors, int device, void* stream) {
  return pysteep::cuda::on_device<Op::backward>(*tensors, device, stream);
}

int pysteep_factor_product_double_backward_cuda(const pysteep_product_tensors* tensors, int device, void* stream) {
  return pysteep::cuda::on_device<Op::double_backward>(*tensors, device, stream);
}

int pysteep_factor_product_cuda_on_host(const pysteep_product_tensors* tensors) {
  return pysteep::cuda::on_host<Op::forward>(*tensors);
}

int pysteep_factor_product_backward_cuda_on_host(const pysteep_product_tensors* tensors) {
  return pysteep::cuda::on_host<Op::backward>(*tensors);
}

int pysteep_factor_product_double_backward_cuda_on_host(const pysteep_product_tensors* tensors) {
  return pysteep::cuda::on_host<Op::double_backward>(*tensors);
}

}  // extern "C"
