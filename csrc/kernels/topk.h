// Exact selection of the k largest scores of a row, written once for every instruction set.
//
// Scores become integers of the same order. The k-th largest is found by bisection: each step counts the
// keys at or above the middle of the bracket, and once few candidates are left they are copied out, so
// that only the first steps read the whole row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "kernels/convert.h"

namespace sparsifiner {
namespace {

inline int64_t count_at_least(const int32_t* keys, int64_t n, int32_t bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

// Integers that order like the floats; +0 and -0 are equal. Returns false if there is a NaN.
inline bool ordered_keys(const void* scores, DType dtype, int64_t n, int32_t* keys, int32_t* lowest, int32_t* highest) {
  if (dtype == DType::float32) {
    const float* from = static_cast<const float*>(scores);
    for (int64_t i = 0; i < n; ++i) keys[i] = static_cast<int32_t>(to_bits(from[i] + 0.0f));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(scores);
    for (int64_t i = 0; i < n; ++i)
      keys[i] = static_cast<int32_t>(to_bits(from_bits(static_cast<uint32_t>(from[i]) << 16) + 0.0f));
  }
  int32_t low = 0x7fffffff, high = -0x7fffffff - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i] ^ ((keys[i] >> 31) & 0x7fffffff);
    keys[i] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  *lowest = low;
  *highest = high;
  constexpr int32_t infinity = 0x7f800000;
  return high <= infinity && low >= ~infinity;
}

// A bound with at least k keys at or above it and fewer than k above it; *exact says whether exactly k
// are at or above it.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int32_t lowest, int32_t highest, int32_t* buffer,
                           int64_t (*compress_range)(const int32_t*, int64_t, int32_t, int32_t, int32_t*),
                           bool* exact) {
  int64_t low = lowest, high = highest;  // the k-th largest lies in [low, high]
  int64_t at_low = n, above_high = 0;    // keys >= low and keys > high, relative to `keys`
  while (low < high) {
    if (at_low == k) break;
    if (at_low - above_high <= n / 4) {
      n = compress_range(keys, n, static_cast<int32_t>(low), static_cast<int32_t>(high), buffer);
      keys = buffer;
      k -= above_high;
      at_low -= above_high;
      above_high = 0;
    }
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t count = count_at_least(keys, n, static_cast<int32_t>(middle));
    if (count >= k) {
      low = middle;
      at_low = count;
    } else {
      high = middle - 1;
      above_high = count;
    }
  }
  *exact = at_low == k;
  return static_cast<int32_t>(low);
}

template <class C>
bool select_topk(const void* scores, DType dtype, int64_t columns, int64_t k, int32_t offset, int32_t* indices,
                 void* memory) {
  int32_t* keys = static_cast<int32_t*>(memory);
  int32_t* buffer = keys + (columns + 63) / 16 * 16;
  int32_t lowest, highest;
  if (!ordered_keys(scores, dtype, columns, keys, &lowest, &highest)) return false;
  bool exact;
  const int32_t bound = kth_largest(keys, columns, k, lowest, highest, buffer, C::range, &exact);
  if (exact) {
    C::indices(keys, columns, bound, offset, buffer);
    for (int64_t i = 0; i < k; ++i) indices[i] = buffer[i];
    return true;
  }
  int64_t ties = k - (bound == 0x7fffffff ? 0 : count_at_least(keys, columns, bound + 1));
  for (int64_t i = 0, n = 0; n < k; ++i) {
    const bool tie = keys[i] == bound && ties > 0;
    ties -= tie;
    indices[n] = static_cast<int32_t>(i) + offset;
    n += (keys[i] > bound) | tie;
  }
  return true;
}

inline void add_rows(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width,
                     float* __restrict sum) {
  for (int64_t r = 0; r < count; ++r) {
    if (dtype == DType::float32) {
      const float* __restrict row = static_cast<const float*>(rows) + r * stride;
      for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
    } else {
      const uint16_t* __restrict row = static_cast<const uint16_t*>(rows) + r * stride;
      for (int64_t d = 0; d < width; ++d) sum[d] += from_bits(static_cast<uint32_t>(row[d]) << 16);
    }
  }
}

inline void store_row(const float* sum, float factor, int64_t width, DType dtype, void* out) {
  float scaled[kMaxWidth];
  for (int64_t d = 0; d < width; ++d) scaled[d] = sum[d] * factor;
  if (dtype == DType::float32)
    __builtin_memcpy(out, scaled, static_cast<std::size_t>(width) * 4);
  else
    narrow(scaled, static_cast<uint16_t*>(out), static_cast<int>(width));
}

}  // namespace
}  // namespace sparsifiner
