// Any CPU, through the compilers' generic vectors of four floats: SSE2 on x86-64, NEON on arm64.
#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_portable_vector.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"

using Portable = PortableVector<4>;

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
    attend_scratch, attend, select_topk<ScalarCompressor>, add_rows, store_row, kKeyBlock<Portable>, Portable::keys, key_words, pack_keys, score_scratch<Portable>, score, quad_words<Mode::plain>, pack_quad<Mode::plain>, score_quads_scratch<Portable>, score_quads_by_dtype<Portable, ScalarCompressor>, group_scratch<Portable>, group_tile<Portable>, nearest_scratch<Portable>, nearest<Portable>, half_square, distances,
};

}  // namespace sparsifiner
