// Products of bytes (VNNI) in AVX-512 vectors. Included inside the anonymous namespace of a level, after
// level_avx512_vector.h.

struct Avx512Bytes : Avx512 {
  using I = __m512i;
  static I load_integers(const int32_t* p) { return _mm512_loadu_si512(p); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  // sum[lane] += the four products of the word's bytes, unsigned, with the lane's, signed.
  static I dot_bytes(uint32_t word, I lanes, I sum) {
    // Not the intrinsic: around it GCC 12 copies every sum to another register and back.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(static_cast<int>(word))), "v"(lanes));
    return sum;
  }

  // to[d] = row[d] * factor, rounded to the nearest integer; returns their sum. `width` is a multiple of 16.
  static int32_t round_to_bytes(const float* row, float factor, int width, int8_t* to) {
    I sum = _mm512_setzero_si512();
    for (int d = 0; d < width; d += lanes) {
      const I whole = _mm512_cvtps_epi32(mul(load(row + d), set(factor)));
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), _mm512_cvtsepi32_epi8(whole));
    }
    return _mm512_reduce_add_epi32(sum);
  }
};
