// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/factor_product.h.
#include "math/factor_product.h"

#include "cpu/factor_blocks.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"
#include "pysteep/factor_product.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

using Tensors = pysteep_product_tensors;

// Calls visit(begin, n) for every block of the tensors.
template <typename Visit>
void for_each_block(const Tensors& tensors, const Visit& visit) {
  const int64_t size = block_size(tensors.depth, tensors.dtype);
  for_each_chunk(&tensors.numel, 1, [&](int64_t, int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; at += size) visit(at, at + size < end ? size : end - at);
    finish_streaming();
  });
}

template <typename T>
void multiply_duals(T* __restrict value, T* __restrict tangent, const T* __restrict w, const T* __restrict v, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Dual<T> product = Dual<T>{value[i], tangent[i]} * Dual<T>{w[i], v[i]};
    value[i] = product.value;
    tangent[i] = product.tangent;
  }
}

template <typename T>
void forward(const Tensors& tensors) {
  const bool streams = tensors.numel >= streamed_elements;
  for_each_block(tensors, [&](int64_t at, int64_t n) {
    alignas(64) T product[block_elements];
    for (int64_t k = 0; k < tensors.depth; ++k) {
      Block<T> w(tensors.factor[k], tensors.dtype, at, n);
      k == 0 ? copy(w.data(), n, product) : multiply(product, w.data(), n, product);
    }
    store_block(product, tensors.result, tensors.dtype, at, n, streams);
  });
}

template <typename T>
void backward(const Tensors& tensors) {
  const bool streams = tensors.numel >= streamed_elements;
  const int64_t last = tensors.depth - 1, size = block_size(tensors.depth, tensors.dtype);
  for_each_block(tensors, [&](int64_t at, int64_t n) {
    alignas(64) T tails[tail_elements], head[block_elements], result[block_elements];
    for (int64_t k = last; k > 0; --k) {
      Block<T> w(tensors.factor[k], tensors.dtype, at, n);
      T* tail = tails + (k - 1) * size;
      k < last ? multiply(tail + size, w.data(), n, tail) : copy(w.data(), n, tail);
    }
    Block<T> gradient(tensors.gradient, tensors.dtype, at, n);
    copy(gradient.data(), n, head);
    for (int64_t k = 0; k < last; ++k) {
      Block<T> w(tensors.factor[k], tensors.dtype, at, n);
      gradient_and_head(tails + k * size, w.data(), n, head, result);
      store_block(result, tensors.factor_gradient[k], tensors.dtype, at, n, streams);
    }
    store_block(head, tensors.factor_gradient[last], tensors.dtype, at, n, streams);
  });
}

template <typename T>
void double_backward(const Tensors& tensors) {
  const bool streams = tensors.numel >= streamed_elements;
  const int64_t last = tensors.depth - 1, size = block_size(tensors.depth, tensors.dtype);
  for_each_block(tensors, [&](int64_t at, int64_t n) {
    alignas(64) T tails[tail_elements], tail_tangents[tail_elements];
    alignas(64) T head[block_elements], head_tangent[block_elements], result[block_elements];
    for (int64_t i = 0; i < n; ++i) {
      head[i] = tails[last * size + i] = T(1);
      head_tangent[i] = tail_tangents[last * size + i] = T(0);
    }
    for (int64_t k = last; k > 0; --k) {
      Block<T> w(tensors.factor[k], tensors.dtype, at, n), v(tensors.tangent[k], tensors.dtype, at, n);
      T *tail = tails + (k - 1) * size, *tangent = tail_tangents + (k - 1) * size;
      copy(w.data(), n, tail);
      copy(v.data(), n, tangent);
      multiply_duals(tail, tangent, tails + k * size, tail_tangents + k * size, n);
    }
    Block<T> gradient(tensors.gradient, tensors.dtype, at, n);
    const T* __restrict g = gradient.data();
    for (int64_t k = 0; k <= last; ++k) {
      const T* __restrict tail = tails + k * size, * __restrict tangent = tail_tangents + k * size;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        result[i] = factor_second_gradient(g[i], Dual<T>{head[i], head_tangent[i]}, Dual<T>{tail[i], tangent[i]});
      store_block(result, tensors.factor_gradient[k], tensors.dtype, at, n, streams);
      Block<T> w(tensors.factor[k], tensors.dtype, at, n), v(tensors.tangent[k], tensors.dtype, at, n);
      multiply_duals(head, head_tangent, w.data(), v.data(), n);
    }
    store_block(head_tangent, tensors.result, tensors.dtype, at, n, streams);
  });
}

void advise_for_gradients(const Tensors& tensors) {
  for (int64_t k = 0; k < tensors.depth; ++k)
    advise_huge_pages(tensors.factor_gradient[k], tensors.numel * bytes_of(tensors.dtype));
}

}  // namespace

void factor_product_cpu(const Tensors& tensors) {
  advise_huge_pages(tensors.result, tensors.numel * bytes_of(tensors.dtype));
  tensors.dtype == PYSTEEP_FLOAT64 ? forward<double>(tensors) : forward<float>(tensors);
}

void factor_product_backward_cpu(const Tensors& tensors) {
  advise_for_gradients(tensors);
  tensors.dtype == PYSTEEP_FLOAT64 ? backward<double>(tensors) : backward<float>(tensors);
}

void factor_product_double_backward_cpu(const Tensors& tensors) {
  advise_for_gradients(tensors);
  advise_huge_pages(tensors.result, tensors.numel * bytes_of(tensors.dtype));
  tensors.dtype == PYSTEEP_FLOAT64 ? double_backward<double>(tensors) : double_backward<float>(tensors);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
