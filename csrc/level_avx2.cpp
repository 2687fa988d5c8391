// AVX2 with FMA. Compiled with flags for them; reached only where the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"

struct Avx2 {
  using F = __m256;
  static constexpr int lanes = 8, vectors = 2, keys = 6;
  static constexpr int dims(int vectors) { return vectors == 1 ? 8 : 4; }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  // to[word][block][key] from kQuad words of kQuad keys of each of lanes / kQuad blocks.
  static void load_quads(const uint32_t* const* blocks, int first, F* to) {
    for (int w = 0; w < kQuad; w += 2) {
      const auto half = [&](int i) { return load(reinterpret_cast<const float*>(blocks[i] + first + w * kQuad)); };
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

  // 2^x for x <= 0; 0 below -126, NaN for NaN. Relative error 1e-7.
  template <bool coarse>
  static F exp2(F x) {
    const F keep = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    const F whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm256_sub_ps(x, whole);
    F p = _mm256_fmadd_ps(_mm256_set1_ps(0x1.5c08e6p-10f), r, _mm256_set1_ps(0x1.3d0c52p-7f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.c6b6e4p-5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.ebf918p-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.62e428p-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.000002p+0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
  }
};

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx2, Mode::plain>(task, memory);
  else
    attend_tile<Avx2, Mode::convert>(task, memory);
}

int key_words(DType, int width) { return width; }

void pack_keys(const void* const* rows, DType dtype, int count, int width, void* packed) {
  if (dtype == DType::float32)
    pack_keys_as<Avx2, Mode::plain>(rows, count, width, packed);
  else
    pack_keys_as<Avx2, Mode::convert>(rows, count, width, packed);
}

bool score(const ScoreTask& task, void* memory) {
  if (task.dtype == DType::float32) return score_tiles<Avx2, Mode::plain, ScalarCompressor>(task, memory);
  return score_tiles<Avx2, Mode::convert, ScalarCompressor>(task, memory);
}
}  // namespace

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {
    attend_scratch, attend, select_topk<ScalarCompressor>, add_rows, store_row, kKeyBlock<Avx2>, Avx2::keys, key_words, pack_keys, score_scratch<Avx2>, score, quad_words<Mode::plain>, pack_quad<Mode::plain>, score_quads_scratch<Avx2>, score_quads_by_dtype<Avx2, ScalarCompressor>, group_scratch<Avx2>, group_tile<Avx2>, nearest_scratch<Avx2>, nearest<Avx2>, distances,
};

}  // namespace sparsifiner
