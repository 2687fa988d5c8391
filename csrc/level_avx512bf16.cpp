// AVX-512 with products of bfloat16, and of bytes (VNNI), which every such CPU has. Compiled with flags for them; reached only where the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_avx512_vector.h"
#include "level_avx512bf16_vector.h"
#include "level_avx512bytes_vector.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "score_bytes_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx512, Mode::plain>(task, memory);
  else
    attend_tile<Avx512Bf16, Mode::dot>(task, memory);
}
}  // namespace

extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels = {
    attend_scratch, attend, select_topk<Avx512Compressor>, add_rows, store_row, kKeyBlock<Avx512>, Avx512::keys, byte_key_words, pack_key_bytes<Avx512Bytes>, score_scratch<Avx512>, score_in_bytes<Avx512Bytes, Avx512Compressor>, quad_words<Mode::dot>, pack_quad<Mode::dot>, score_quads_scratch<Avx512>, score_quads<Avx512Bf16, Mode::dot, Avx512Compressor>, group_scratch<Avx512>, group_tile<Avx512>, nearest_scratch<Avx512>, nearest<Avx512>, half_square, distances,
};

}  // namespace sparsifiner
