// Elements of tensors in a thread's registers, 16 bytes at a time.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/launch.h"
#include "math/dtype.h"
#include "pysteep/tensors.h"

namespace pysteep::cuda {

struct None {};  // the momentum's storage type when there is none
template <typename M>
constexpr bool has_momentum = !std::is_same_v<M, None>;
using pysteep::widen;
PYSTEEP_INLINE float widen(None) { return 0.0f; }

template <typename Storage>
constexpr int vector_elements = 16 / sizeof(Storage);

template <typename Storage, int N>
struct alignas(sizeof(Storage) * N < 16 ? sizeof(Storage) * N : 16) Vector {
  Storage element[N];
};

// Whole vectors are copied by an instruction of their own: nvcc splits the assignment of a struct into its elements, and does
// not always join them again.
template <typename Storage, int N>
PYSTEEP_INLINE Vector<Storage, N> load(const void* address, int64_t at) {
  const Storage* from = static_cast<const Storage*>(address) + at;
#if defined(__CUDA_ARCH__)
  if constexpr (N > 1) {
    Vector<Storage, N> vector;
    uint32_t word[sizeof(vector) / 4];
    const size_t global = __cvta_generic_to_global(from);
    if constexpr (sizeof(vector) == 8) {
      asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(global) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(vector) / 16); ++i)
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[4 * i]), "=r"(word[4 * i + 1]), "=r"(word[4 * i + 2]), "=r"(word[4 * i + 3])
                     : "l"(global + 16 * i)
                     : "memory");
    }
    std::memcpy(&vector, word, sizeof(vector));
    return vector;
  }
#endif
  return *reinterpret_cast<const Vector<Storage, N>*>(from);
}

template <typename Storage, int N>
PYSTEEP_INLINE void store(const Vector<Storage, N>& vector, void* address, int64_t at) {
  Storage* to = static_cast<Storage*>(address) + at;
#if defined(__CUDA_ARCH__)
  if constexpr (N > 1) {
    uint32_t word[sizeof(vector) / 4];
    std::memcpy(word, &vector, sizeof(vector));
    const size_t global = __cvta_generic_to_global(to);
    if constexpr (sizeof(vector) == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(word[0]), "r"(word[1]) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(vector) / 16); ++i)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global + 16 * i), "r"(word[4 * i]), "r"(word[4 * i + 1]),
                     "r"(word[4 * i + 2]), "r"(word[4 * i + 3])
                     : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Vector<Storage, N>*>(to) = vector;
}

// The same number, unknown to the compiler: what follows from it is computed again rather than kept in registers.
PYSTEEP_INLINE int forgotten(int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}
PYSTEEP_INLINE float forgotten(float number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(number));
#endif
  return number;
}
PYSTEEP_INLINE double forgotten(double number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+d"(number));
#endif
  return number;
}

// Calls visit(Storage{}) for the storage type `dtype`, one that computes in T. For operands that are few beside others: their
// types are told apart at run time, and the kernels stay few.
template <typename T, typename Visit>
PYSTEEP_INLINE void with_storage(pysteep_dtype dtype, const Visit& visit) {
  if constexpr (sizeof(T) == 8)
    visit(double{});
  else if (dtype == PYSTEEP_FLOAT16)
    visit(float16{});
  else if (dtype == PYSTEEP_BFLOAT16)
    visit(bfloat16{});
  else
    visit(float{});
}

template <typename T, int N>
PYSTEEP_INLINE Vector<T, N> load_widened(pysteep_dtype dtype, const void* address, int64_t at) {
  Vector<T, N> result;
  with_storage<T>(dtype, [&](auto storage) {
    const auto vector = load<decltype(storage), N>(address, at);
#pragma unroll
    for (int i = 0; i < N; ++i) result.element[i] = widen(vector.element[i]);
  });
  return result;
}

template <typename T, int N>
PYSTEEP_INLINE void store_narrowed(pysteep_dtype dtype, const Vector<T, N>& values, void* address, int64_t at) {
  with_storage<T>(dtype, [&](auto storage) {
    Vector<decltype(storage), N> vector;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(values.element[i], vector.element[i]);
    store(vector, address, at);
  });
}

// A vector whose elements come in turn: the first AtHand of them are at hand, turn() brings the next. A loop over the elements
// then need not be unrolled, and yet no register is indexed at run time, which would move the vector to local memory.
template <typename Storage, int N, int AtHand>
struct Turning {
  static constexpr int words = (N * sizeof(Storage) + 3) / 4, words_of_turn = AtHand * sizeof(Storage) / 4;
  uint32_t word[words];

  PYSTEEP_INLINE Turning() {}
  PYSTEEP_INLINE explicit Turning(const Vector<Storage, N>& vector) { std::memcpy(word, &vector, sizeof(vector)); }
  static PYSTEEP_INLINE Turning of_one(Storage value) {
    Turning result;
#pragma unroll
    for (int i = 0; i < words; ++i) result.word[i] = 0;
    result.set(0, value);
    return result;
  }
  static PYSTEEP_INLINE Turning filled(Storage value) {
    Vector<Storage, N> vector;
#pragma unroll
    for (int i = 0; i < N; ++i) vector.element[i] = value;
    return Turning(vector);
  }
  PYSTEEP_INLINE Vector<Storage, N> vector() const {
    Vector<Storage, N> result;
    std::memcpy(&result, word, sizeof(result));
    return result;
  }

  PYSTEEP_INLINE Storage get(int i) const {
    if constexpr (sizeof(Storage) == 2) return bit_cast<Storage>(uint16_t(word[i / 2] >> (i % 2 * 16)));
    if constexpr (sizeof(Storage) == 4) return bit_cast<Storage>(word[i]);
    if constexpr (sizeof(Storage) == 8) return bit_cast<Storage>(word[2 * i] | uint64_t(word[2 * i + 1]) << 32);
  }
  PYSTEEP_INLINE void set(int i, Storage value) {
    if constexpr (sizeof(Storage) == 2) {
      const int shift = i % 2 * 16;
      word[i / 2] = (word[i / 2] & ~(0xffffu << shift)) | uint32_t(bit_cast<uint16_t>(value)) << shift;
    }
    if constexpr (sizeof(Storage) == 4) word[i] = bit_cast<uint32_t>(value);
    if constexpr (sizeof(Storage) == 8) {
      word[2 * i] = uint32_t(bit_cast<uint64_t>(value));
      word[2 * i + 1] = uint32_t(bit_cast<uint64_t>(value) >> 32);
    }
  }
  PYSTEEP_INLINE void turn() {
    uint32_t next[words];
#pragma unroll
    for (int i = 0; i < words; ++i) next[i] = word[(i + words_of_turn) % words];
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = next[i];
  }
};

// Of N elements of `Storage`: those in one register, or one that fills one or two.
template <typename Storage, int N>
constexpr int at_hand = sizeof(Storage) == 2 && N > 1 ? 2 : 1;

}  // namespace pysteep::cuda
