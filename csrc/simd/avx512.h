// Vectors of 16 floats, shared by the AVX-512 levels.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/kernel_table.h"

namespace sparsifiner {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int lanes = 16, vectors = 2, keys = 8;
  static constexpr int dims(int vectors) { return vectors == 1 ? 16 : 8; }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  // to[word][block][key] from kBlockKeys words of kBlockKeys keys of each of lanes / kBlockKeys blocks.
  static void load_blocks(const uint32_t* const* blocks, int first, F* to) {
    const auto line = [&](int i) { return load(reinterpret_cast<const float*>(blocks[i] + first)); };
    const F low0 = _mm512_shuffle_f32x4(line(0), line(1), 0x44), high0 = _mm512_shuffle_f32x4(line(0), line(1), 0xee);
    const F low1 = _mm512_shuffle_f32x4(line(2), line(3), 0x44), high1 = _mm512_shuffle_f32x4(line(2), line(3), 0xee);
    to[0] = _mm512_shuffle_f32x4(low0, low1, 0x88);
    to[1] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
    to[2] = _mm512_shuffle_f32x4(high0, high1, 0x88);
    to[3] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  // to[w][i] = rows[i][first + w] for 16 rows and 16 words; rows of the result lie `stride` words apart.
  static void transpose(const uint32_t* const* rows, int first, uint32_t* to, int64_t stride) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + first);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i even0 = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88),
                    even1 = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
      const __m512i odd0 = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd),
                    odd1 = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
      _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(even0, even1, 0x88));
      _mm512_storeu_si512(to + (j + 4) * stride, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
      _mm512_storeu_si512(to + (j + 8) * stride, _mm512_shuffle_i32x4(even0, even1, 0xdd));
      _mm512_storeu_si512(to + (j + 12) * stride, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
    }
  }

  // 2^x for x <= 0; 0 for -inf, NaN for NaN. Relative error 1e-7, or 1e-4 where `coarse`.
  template <bool coarse>
  static F exp2(F x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const F integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm512_sub_ps(x, integer);
    F p;
    if constexpr (coarse) {
      p = _mm512_fmadd_ps(_mm512_set1_ps(0.05517167f), r, _mm512_set1_ps(0.24261112f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
    } else {
      p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.5c08e6p-10f), r, _mm512_set1_ps(0x1.3d0c52p-7f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c6b6e4p-5f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebf918p-3f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e428p-1f));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.000002p+0f));
    }
    return _mm512_scalef_ps(p, integer);
  }
};

struct Avx512Compressor {
  static int64_t range(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out) {
    const __m512i lowest = _mm512_set1_epi32(low), highest = _mm512_set1_epi32(high);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 inside = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
      const __m512i key = _mm512_maskz_loadu_epi32(inside, keys + i);
      const __mmask16 wanted =
          _mm512_mask_cmpge_epi32_mask(_mm512_mask_cmple_epi32_mask(inside, key, highest), key, lowest);
      // Compressing to memory directly is microcoded and slow on some CPUs.
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(wanted, key));
      count += __builtin_popcount(wanted);
    }
    return count;
  }

  static void indices(const int32_t* keys, int64_t n, int32_t low, int32_t offset, int32_t* out) {
    const __m512i lowest = _mm512_set1_epi32(low), step = _mm512_set1_epi32(16);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(offset),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16, index = _mm512_add_epi32(index, step)) {
      const __mmask16 inside = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
      const __m512i key = _mm512_maskz_loadu_epi32(inside, keys + i);
      const __mmask16 wanted = _mm512_mask_cmpge_epi32_mask(inside, key, lowest);
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(wanted, index));
      count += __builtin_popcount(wanted);
    }
  }
};

}  // namespace
}  // namespace sparsifiner
