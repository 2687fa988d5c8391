// The tile unit of amx.h in plain C++, after the description of TDPBF16PS in Intel's Software
// Developer's Manual, volume 2: even and odd elements are summed apart, in float32, to nearest even, with
// denormals taken as and made zero; then the two sums are added, and that to the tile.
#pragma once

#include <cstdint>

#include "kernels/convert.h"

namespace sparsifiner {
namespace {

inline float flush_denormal(float x) {
  const uint32_t bits = to_bits(x);
  return from_bits((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}

using EmulatedTile = uint32_t[16][16];

// TDPBF16PS: c += a b.
inline void multiply_pairs(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  float right[2][16][16];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 16; ++n) {
      right[0][k][n] = flush_denormal(from_bits(b[k][n] << 16));
      right[1][k][n] = flush_denormal(from_bits(b[k][n] & 0xffff0000));
    }
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float left_even = flush_denormal(from_bits(a[m][k] << 16));
      const float left_odd = flush_denormal(from_bits(a[m][k] & 0xffff0000));
      // A product of two bfloat16 is exact in float32, so this is the fused operation of the manual.
      for (int n = 0; n < 16; ++n) {
        even[n] = flush_denormal(even[n] + left_even * right[0][k][n]);
        odd[n] = flush_denormal(odd[n] + left_odd * right[1][k][n]);
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float before = flush_denormal(from_bits(c[m][n]));
      c[m][n] = to_bits(flush_denormal(before + flush_denormal(even[n] + odd[n])));
    }
  }
}

struct EmulatedTiles {
  struct State {
    bool configured;
    EmulatedTile tile[8];
  };
  static inline thread_local State state;

  // As on the hardware: configuring clears the tiles, and using them unconfigured is a fault.
  static void configure() {
    state.configured = true;
    __builtin_memset(state.tile, 0, sizeof state.tile);
  }
  static void release() { state.configured = false; }
  static void require() {
    if (!state.configured) __builtin_trap();
  }

  template <int t>
  static void zero() {
    require();
    __builtin_memset(state.tile[t], 0, sizeof state.tile[t]);
  }

  template <int t>
  static void load(const void* words, int64_t stride) {
    require();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(state.tile[t][row], static_cast<const char*>(words) + 4 * stride * row, 64);
  }

  template <int t>
  static void store(void* words, int64_t stride) {
    require();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(static_cast<char*>(words) + 4 * stride * row, state.tile[t][row], 64);
  }

  template <int c, int a, int b>
  static void multiply() {
    require();
    multiply_pairs(state.tile[c], state.tile[a], state.tile[b]);
  }
};

}  // namespace
}  // namespace sparsifiner
