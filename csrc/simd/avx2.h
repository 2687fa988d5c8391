// Vectors of 8 floats in AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/kernel_table.h"
#include "simd/scalar_compressor.h"

namespace sparsifiner {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int lanes = 8, vectors = 2, keys = 6;
  static constexpr int dims(int vectors) { return vectors == 1 ? 8 : 4; }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  // to[word][block][key] from kBlockKeys words of kBlockKeys keys of each of lanes / kBlockKeys blocks.
  static void load_blocks(const uint32_t* const* blocks, int first, F* to) {
    for (int w = 0; w < kBlockKeys; w += 2) {
      const auto half = [&](int i) { return load(reinterpret_cast<const float*>(blocks[i] + first + w * kBlockKeys)); };
      to[w] = _mm256_permute2f128_ps(half(0), half(1), 0x20);
      to[w + 1] = _mm256_permute2f128_ps(half(0), half(1), 0x31);
    }
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  static bool any_greater(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }

  // to[w][i] = rows[i][first + w] for 8 rows and 8 words; rows of the result lie `stride` words apart.
  static void transpose(const uint32_t* const* rows, int first, uint32_t* to, int64_t stride) {
    F r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = load(reinterpret_cast<const float*>(rows[i] + first));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    // r[w] and r[w + 4] hold words w and w + 4 of rows 0 to 3, then of rows 4 to 7.
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      store(reinterpret_cast<float*>(to + w * stride), _mm256_permute2f128_ps(r[w], r[w + 4], 0x20));
      store(reinterpret_cast<float*>(to + (w + 4) * stride), _mm256_permute2f128_ps(r[w], r[w + 4], 0x31));
    }
  }

  // 2^x for x <= 0; 0 below -126, NaN for NaN. Relative error 1e-7.
  template <bool coarse>
  static F exp2(F x) {
    const F keep = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    const F integer = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm256_sub_ps(x, integer);
    F p = _mm256_fmadd_ps(_mm256_set1_ps(0x1.5c08e6p-10f), r, _mm256_set1_ps(0x1.3d0c52p-7f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.c6b6e4p-5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.ebf918p-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.62e428p-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.000002p+0f));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(integer), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
  }
};

// For each of 256 choices among 8 lanes: the chosen ones, in order.
struct ChosenLanes {
  alignas(64) uint8_t lane[256][8] = {};
  constexpr ChosenLanes() {
    for (int choice = 0; choice < 256; ++choice)
      for (int i = 0, n = 0; i < 8; ++i)
        if (choice >> i & 1) lane[choice][n++] = static_cast<uint8_t>(i);
  }
};

struct Avx2Compressor {
  static constexpr ChosenLanes chosen{};

  // Writes 8 elements, of which those not left out come first; returns how many those are.
  static int64_t put(__m256i x, __m256i left_out, int32_t* out) {
    const int choice = 0xff ^ _mm256_movemask_ps(_mm256_castsi256_ps(left_out));
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(chosen.lane[choice]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(order)));
    return __builtin_popcount(static_cast<unsigned>(choice));
  }
  static __m256i load(const int32_t* keys) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)); }

  static int64_t range(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out) {
    const __m256i least = _mm256_set1_epi32(low), most = _mm256_set1_epi32(high);
    int64_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256i key = load(keys + i);
      const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(least, key), _mm256_cmpgt_epi32(key, most));
      count += put(key, outside, out + count);
    }
    return count + ScalarCompressor::range(keys + i, n - i, low, high, out + count);
  }
  static void indices(const int32_t* keys, int64_t n, int32_t low, int32_t offset, int32_t* out) {
    const __m256i least = _mm256_set1_epi32(low), step = _mm256_set1_epi32(8);
    __m256i number = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(offset));
    int64_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8, number = _mm256_add_epi32(number, step)) {
      count += put(number, _mm256_cmpgt_epi32(least, load(keys + i)), out + count);
    }
    ScalarCompressor::indices(keys + i, n - i, low, offset + static_cast<int32_t>(i), out + count);
  }
};

}  // namespace
}  // namespace sparsifiner
