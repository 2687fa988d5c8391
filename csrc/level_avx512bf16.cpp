// AVX-512 with bfloat16 products. Compiled with flags for them; reached only where the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_avx512_vector.h"
#include "level_avx512bf16_vector.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx512, Mode::plain>(task, memory);
  else
    attend_tile<Avx512Bf16, Mode::dot>(task, memory);
}

int key_words(DType, int width) { return width / 2; }

bool score(const ScoreTask& task, void* memory) {
  return score_tiles<Avx512Bf16, Mode::dot, Avx512Compressor>(task, memory);
}
}  // namespace

extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels = {
    attend_scratch, attend, select_topk<Avx512Compressor>, add_rows, store_row, kKeyBlock<Avx512>, Avx512::keys, key_words, pack_key_pairs<Avx512Bf16>, score_scratch<Avx512>, score, quad_words<Mode::dot>, pack_quad<Mode::dot>, score_quads_scratch<Avx512>, score_quads<Avx512Bf16, Mode::dot, Avx512Compressor>, group_scratch<Avx512>, group_tile<Avx512>, distances,
};

}  // namespace sparsifiner
