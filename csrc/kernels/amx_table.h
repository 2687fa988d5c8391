// The table of an AMX level: all but float32 attention and the scores of chosen blocks run in tiles. V is a vector type
// of 16 float32 with pairs of bfloat16, C its compressor, Tiles the tile unit (amx.h).
#pragma once

#include "core/kernel_table.h"
#include "kernels/amx.h"
#include "kernels/table.h"

namespace sparsifiner {
namespace {

template <class V, class Tiles>
void attend_in_amx(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<V, Mode::plain>(task, memory);
  else
    attend_in_tiles<V, Tiles>(task, memory);
}

inline std::size_t attend_scratch_in_amx(const TileTask& task) {
  return task.dtype == DType::float32 ? attend_scratch(task) : attend_scratch_in_tiles(task);
}

inline int words_of_tiles(DType, int width) { return tile_words(width); }

template <class V, class C, class Tiles>
constexpr Kernels amx_table() {
  Kernels table = float32_kernels<V, C>();
  table.attend_scratch = attend_scratch_in_amx;
  table.attend = attend_in_amx<V, Tiles>;
  table.bfloat16_products = true;
  table.score_queries = kTileSide;
  table.key_words = words_of_tiles;
  table.pack_keys = pack_keys_in_tiles<V>;
  table.score_scratch = score_scratch_in_tiles<V>;
  table.score = score_in_tiles<V, Tiles, C>;
  table.block_words = block_words<Mode::dot>;
  table.pack_block = pack_block<Mode::dot>;
  table.score_blocks = score_blocks<V, Mode::dot, C>;
  return table;
}

}  // namespace
}  // namespace sparsifiner
