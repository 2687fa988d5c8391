// Pairs of bfloat16 in AVX-512 vectors, shared by the levels that have such products.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx512.h"

namespace sparsifiner {
namespace {

struct Avx512Bf16 : Avx512 {
  static F dot(F lanes, uint32_t pair, F sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)));
  }

  // to[lane] = the bfloat16 of (even[lane], odd[lane]).
  static void store_pairs(uint32_t* to, F even, F odd) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
  }

  // to[d] = (even[d], odd[d]); a missing row counts as zeros.
  static void pair_rows(const void* even, const void* odd, uint32_t* to, int width) {
    const uint16_t* a = static_cast<const uint16_t*>(even);
    const uint16_t* b = static_cast<const uint16_t*>(odd);
    for (int d = 0; d < width; d += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + d)));
      __m512i high = _mm512_setzero_si512();
      if (b != nullptr) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + d)));
      _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};

}  // namespace
}  // namespace sparsifiner
