// Built once per instruction set, as pysteep::<isa>. The arithmetic is in math/sign_vote.h.
#include "math/sign_vote.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "pysteep/sign_vote.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {
namespace {

constexpr int64_t group = 32;  // elements of a word

// 1 << j: not every instruction set shifts each number of a vector by its own count.
struct Places {
  uint32_t place[group];
  constexpr Places() : place() {
    for (int j = 0; j < group; ++j) place[j] = uint32_t(1) << j;
  }
};
alignas(64) constexpr Places places;

void store_word(uint32_t word, uint8_t* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) to[i] = uint8_t(word >> 8 * i);
}

uint32_t load_word(const uint8_t* from, int64_t bytes) {
  uint32_t word = 0;
  for (int64_t i = 0; i < bytes; ++i) word |= uint32_t(from[i]) << 8 * i;
  return word;
}

template <typename Storage, typename Count>
uint32_t pack_group(const Storage* values, Count n, uint32_t zeros) {
  uint32_t positive = 0, negative = 0;
#pragma omp simd reduction(| : positive, negative)
  for (int j = 0; j < n; ++j) {
    const bits_t<Storage> x = bit_cast<bits_t<Storage>>(values[j]);
    positive |= is_positive<Storage>(x) ? places.place[j] : 0;
    negative |= is_negative<Storage>(x) ? places.place[j] : 0;
  }
  return packed(positive, negative, zeros);
}

// The bytes [begin, end) of a row.
template <typename Storage>
void pack_bytes(const Storage* values, int64_t numel, uint32_t zeros, int64_t begin, int64_t end, uint8_t* words) {
  for (int64_t at = begin; at < end; at += group / 8) {
    const int64_t first = 8 * at, n = std::clamp<int64_t>(numel - first, 0, group), bytes = std::min(end - at, group / 8);
    if (n == group && bytes == group / 8) {
      store_word(pack_group(values + first, std::integral_constant<int, group>{}, zeros), words + at, group / 8);
    } else {
      const int taken = int(std::min(n, 8 * bytes));
      const uint32_t filled = taken == group ? ~0u : (1u << taken) - 1;
      store_word(pack_group(values + first, taken, zeros) & filled, words + at, bytes);
    }
  }
}

template <typename Storage>
void pack(const pysteep_votes& votes, int64_t phase) {
  const uint32_t zeros = zeros_of(phase);
  const int64_t elements = 8 * votes.rows * votes.row_bytes;
  for_each_chunk(&elements, 1, [&](int64_t, int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin / 8, row, stop; at < end / 8; at = stop) {
      row = at / votes.row_bytes;
      stop = std::min(end / 8, (row + 1) * votes.row_bytes);
      const int64_t first = row * votes.row_bytes;
      pack_bytes(static_cast<const Storage*>(votes.values) + row * votes.numel, votes.numel, zeros, at - first, stop - first,
                 votes.words + first);
    }
  });
}

constexpr int64_t block_words = 64;  // of 64 elements; 16 planes of them stay in the first-level cache
constexpr int most_planes = 16;      // hold PYSTEEP_MAX_VOTERS
constexpr int64_t block_bytes = block_words * 8;
using Words = uint64_t[block_words];

void add_votes(Words* planes, int count, const uint8_t* row, int64_t bytes) {
  alignas(64) Words carry;
  const int64_t words = (bytes + 7) / 8;
  carry[words - 1] = 0;
  std::memcpy(carry, row, size_t(bytes));
  for (int p = 0; p < count; ++p) {
    uint64_t* __restrict plane = planes[p];
#pragma omp simd
    for (int64_t i = 0; i < words; ++i) half_add(plane[i], carry[i]);
  }
}

template <typename Storage, typename Count>
void store_votes(uint32_t more, uint32_t tie, Count n, Storage* values) {
#pragma omp simd
  for (int j = 0; j < n; ++j) values[j] = vote<Storage>((more & places.place[j]) != 0, (tie & places.place[j]) != 0);
}

// The elements of the bytes [begin, end), which a block has room for.
template <typename Storage>
void count_bytes(const pysteep_votes& votes, int64_t begin, int64_t end) {
  alignas(64) Words planes[most_planes], more, equal;
  const int64_t bytes = end - begin, limit = votes.rows / 2;
  const int used = planes_of(votes.rows);
  std::memset(planes, 0, sizeof(Words) * size_t(used));
  for (int64_t row = 0; row < votes.rows; ++row)
    add_votes(planes, planes_of(row + 1), votes.words + row * votes.row_bytes + begin, bytes);
  std::memset(more, 0, sizeof(more));
  std::memset(equal, 0xff, sizeof(equal));
  for (int p = used - 1; p >= 0; --p) {
    const bool bit = (limit >> p & 1) != 0;
#pragma omp simd
    for (int64_t i = 0; i < block_words; ++i) compare(planes[p][i], bit, more[i], equal[i]);
  }
  if (votes.rows % 2 != 0) std::memset(equal, 0, sizeof(equal));
  const uint8_t *of_more = reinterpret_cast<const uint8_t*>(more), *of_equal = reinterpret_cast<const uint8_t*>(equal);
  Storage* values = static_cast<Storage*>(votes.values);
  for (int64_t at = 0; at < bytes; at += group / 8) {
    const int64_t first = 8 * (begin + at), n = std::min(votes.numel - first, group), rest = std::min(bytes - at, group / 8);
    const uint32_t above = load_word(of_more + at, rest), tie = load_word(of_equal + at, rest);
    if (n == group && rest == group / 8)
      store_votes(above, tie, std::integral_constant<int, group>{}, values + first);
    else
      store_votes(above, tie, int(std::min(n, 8 * rest)), values + first);
  }
}

template <typename Storage>
void count(const pysteep_votes& votes) {
  const int64_t elements = votes.numel, last = (votes.numel + 7) / 8;
  for_each_chunk(&elements, 1, [&](int64_t, int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin / 8, stop = std::min(last, (end + 7) / 8); at < stop; at += block_bytes)
      count_bytes<Storage>(votes, at, std::min(stop, at + block_bytes));
  });
}

}  // namespace

void pack_signs_cpu(const pysteep_votes& votes, int64_t phase) {
  if (votes.dtype == PYSTEEP_FLOAT16) pack<float16>(votes, phase);
  if (votes.dtype == PYSTEEP_BFLOAT16) pack<bfloat16>(votes, phase);
  if (votes.dtype == PYSTEEP_FLOAT32) pack<float>(votes, phase);
  if (votes.dtype == PYSTEEP_FLOAT64) pack<double>(votes, phase);
}

void count_votes_cpu(const pysteep_votes& votes) {
  if (votes.dtype == PYSTEEP_FLOAT16) count<float16>(votes);
  if (votes.dtype == PYSTEEP_BFLOAT16) count<bfloat16>(votes);
  if (votes.dtype == PYSTEEP_FLOAT32) count<float>(votes);
  if (votes.dtype == PYSTEEP_FLOAT64) count<double>(votes);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
