// Products of bytes (VNNI) in AVX-512 vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx512.h"

namespace sparsifiner {
namespace {

struct Avx512Vnni : Avx512 {
  using I = __m512i;
  static I load_integers(const int32_t* p) { return _mm512_loadu_si512(p); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  // sum[lane] += the four products of the word's bytes, unsigned, with the lane's, signed.
  static I dot_int8(uint32_t word, I lanes, I sum) {
    // Not the intrinsic: around it GCC 12 copies every sum to another register and back.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(static_cast<int>(word))), "v"(lanes));
    return sum;
  }

  // to[d] = row[d] * factor, rounded to the nearest integer; returns their sum. `width` is a multiple of 16.
  static int32_t round_to_int8(const float* row, float factor, int width, int8_t* to) {
    I sum = _mm512_setzero_si512();
    for (int d = 0; d < width; d += lanes) {
      const I rounded = _mm512_cvtps_epi32(mul(load(row + d), set(factor)));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), _mm512_cvtsepi32_epi8(rounded));
    }
    return _mm512_reduce_add_epi32(sum);
  }
};

}  // namespace
}  // namespace sparsifiner
