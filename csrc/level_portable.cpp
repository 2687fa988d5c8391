// Any CPU, through the compilers' generic vectors of four floats: SSE2 on x86-64, NEON on arm64.
#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "group_kernel.h"

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int lanes = 4, vectors = 2, keys = 4;
  static constexpr int dims(int) { return 4; }
  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
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
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
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

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Portable, Mode::plain>(task, memory);
  else
    attend_tile<Portable, Mode::convert>(task, memory);
}

int key_words(DType, int width) { return width; }

void pack_keys(const void* const* rows, DType dtype, int count, int width, void* packed) {
  if (dtype == DType::float32)
    pack_keys_as<Portable, Mode::plain>(rows, count, width, packed);
  else
    pack_keys_as<Portable, Mode::convert>(rows, count, width, packed);
}

bool score(const ScoreTask& task, void* memory) {
  if (task.dtype == DType::float32) return score_tiles<Portable, Mode::plain, ScalarCompressor>(task, memory);
  return score_tiles<Portable, Mode::convert, ScalarCompressor>(task, memory);
}
}  // namespace

extern const Kernels portable_kernels;
const Kernels portable_kernels = {
    attend_scratch, attend, select_topk<ScalarCompressor>, add_rows, store_row, kKeyBlock<Portable>, key_words, pack_keys, score_scratch<Portable>, score, group_tile, distances,
};

}  // namespace sparsifiner
