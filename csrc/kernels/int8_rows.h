// Rows rounded to integers of -127 to 127 times a factor of their own.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/convert.h"

namespace sparsifiner {
namespace {

struct Int8Factors {
  float rounding;  // row * rounding are the integers
  float scale;     // integers * scale are the row; NaN if it holds a number that is not finite
};

inline Int8Factors int8_factors(const float* row, int width) {
  constexpr int32_t infinity = 0x7f800000;
  int32_t top = 0;  // as integers, magnitudes order like the floats, and NaN comes last
  for (int d = 0; d < width; ++d) {
    const int32_t magnitude = static_cast<int32_t>(to_bits(row[d]) & 0x7fffffff);
    top = magnitude > top ? magnitude : top;
  }
  if (top >= infinity) return {0.0f, __builtin_nanf("")};
  const float largest = from_bits(static_cast<uint32_t>(top));
  if (largest < 1e-30f) return {0.0f, 0.0f};  // 127 divided by it might not be finite
  return {127.0f / largest, largest / 127.0f};
}

// The row less `offset`, as integers with 128 added to each: the instruction wants one side unsigned.
template <class V>
inline void round_key(const float* row, const float* offset, int width, uint8_t* out, float* scale) {
  float centred[kMaxWidth];
  for (int d = 0; d < width; ++d) centred[d] = row[d] - offset[d];
  const Int8Factors factors = int8_factors(centred, width);
  V::round_to_int8(centred, factors.rounding, width, reinterpret_cast<int8_t*>(out));
  for (int d = 0; d < width; ++d) out[d] ^= 0x80;
  *scale = factors.scale;
}

}  // namespace
}  // namespace sparsifiner
