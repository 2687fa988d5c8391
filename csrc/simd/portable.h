// The compilers' generic vectors of L floats, on any CPU.
#pragma once

#include <cstdint>

#include "core/kernel_table.h"

namespace sparsifiner {
namespace {

template <int L>
struct PortableVector {
  typedef float F __attribute__((vector_size(4 * L)));
  typedef int32_t I __attribute__((vector_size(4 * L)));
  static constexpr int lanes = L, vectors = 2, keys = 4;
  static constexpr int dims(int) { return 4; }
  static F set(float x) { return F{} + x; }
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  // to[word][block][key] from kBlockKeys words of kBlockKeys keys of each of lanes / kBlockKeys blocks.
  static void load_blocks(const uint32_t* const* blocks, int first, F* to) {
    for (int w = 0; w < kBlockKeys; ++w)
      for (int i = 0; i < L / kBlockKeys; ++i)
        __builtin_memcpy(reinterpret_cast<char*>(to + w) + i * kBlockKeys * 4, blocks[i] + first + w * kBlockKeys,
                         kBlockKeys * 4);
  }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F select(I condition, F a, F b) { return (F)((condition & (I)a) | (~condition & (I)b)); }
  static F max(F a, F b) { return select((I)(a > b), a, b); }  // b if either is NaN
  static bool any_greater(F a, F b) {
    const I greater = (I)(a > b);
    int32_t each[L], any = 0;
    __builtin_memcpy(each, &greater, sizeof each);
    for (int i = 0; i < L; ++i) any |= each[i];
    return any != 0;
  }

  // to[w][i] = rows[i][first + w] for L rows and L words; rows of the result lie `stride` words apart.
  static void transpose(const uint32_t* const* rows, int first, uint32_t* to, int64_t stride) {
    for (int i = 0; i < L; ++i)
      for (int w = 0; w < L; ++w) __builtin_memcpy(to + w * stride + i, rows[i] + first + w, 4);
  }

  // 2^x for x <= 0; 0 below -126, NaN for NaN. Relative error 1e-7.
  template <bool coarse>
  static F exp2(F x) {
    const I vanish = (I)(x < set(-126.0f));
    x = select(vanish, set(-126.0f), x);
    // Adding this constant leaves the nearest whole number in the low bits of the mantissa.
    const F magic = set(12582912.0f);
    const F shifted = x + magic;
    const F r = x - (shifted - magic);
    F p = set(0x1.5c08e6p-10f) * r + set(0x1.3d0c52p-7f);
    p = p * r + set(0x1.c6b6e4p-5f);
    p = p * r + set(0x1.ebf918p-3f);
    p = p * r + set(0x1.62e428p-1f);
    p = p * r + set(0x1.000002p+0f);
    const I exponent = ((I)shifted - (I)magic + 127) << 23;
    return (F)(~vanish & (I)(p * (F)exponent));
  }
};

}  // namespace
}  // namespace sparsifiner
