// AVX-512 F, BW, DQ, VL. Compiled with flags for them; reached only where the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_avx512_vector.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx512, Mode::plain>(task, memory);
  else
    attend_tile<Avx512, Mode::convert>(task, memory);
}

int key_words(DType, int width) { return width; }

void pack_keys(const void* const* rows, DType dtype, int count, int width, void* packed) {
  if (dtype == DType::float32)
    pack_keys_as<Avx512, Mode::plain>(rows, count, width, packed);
  else
    pack_keys_as<Avx512, Mode::convert>(rows, count, width, packed);
}

bool score(const ScoreTask& task, void* memory) {
  if (task.dtype == DType::float32) return score_tiles<Avx512, Mode::plain, Avx512Compressor>(task, memory);
  return score_tiles<Avx512, Mode::convert, Avx512Compressor>(task, memory);
}
}  // namespace

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {
    attend_scratch, attend, select_topk<Avx512Compressor>, add_rows, store_row, kKeyBlock<Avx512>, Avx512::keys, key_words, pack_keys, score_scratch<Avx512>, score, quad_words<Mode::plain>, pack_quad<Mode::plain>, score_quads_scratch<Avx512>, score_quads_by_dtype<Avx512, Avx512Compressor>, group_scratch<Avx512>, group_tile<Avx512>, nearest_scratch<Avx512>, nearest<Avx512>, half_square, distances,
};

}  // namespace sparsifiner
