// Conversions between float32, its bits, and bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace sparsifiner {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline void widen(const uint16_t* from, uint32_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
}

inline void widen_row(const void* from, DType dtype, int width, float* to) {
  if (dtype == DType::float32)
    __builtin_memcpy(to, from, static_cast<std::size_t>(width) * 4);
  else
    widen(static_cast<const uint16_t*>(from), reinterpret_cast<uint32_t*>(to), width);
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow(const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(from[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

}  // namespace
}  // namespace sparsifiner
