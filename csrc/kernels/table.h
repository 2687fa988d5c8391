// The table of a level with products of float32 only: V is its vector type, C its compressor. Levels with further
// instructions replace entries.
#pragma once

#include "core/kernel_table.h"
#include "kernels/attend.h"
#include "kernels/block_scores.h"
#include "kernels/groups.h"
#include "kernels/scores.h"
#include "kernels/topk.h"

namespace sparsifiner {
namespace {

template <class V>
void attend_by_dtype(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<V, Mode::plain>(task, memory);
  else
    attend_tile<V, Mode::convert>(task, memory);
}

template <class V>
void pack_keys_by_dtype(const void* const* rows, DType dtype, int count, int width, void* packed) {
  if (dtype == DType::float32)
    pack_keys_as<V, Mode::plain>(rows, count, width, packed);
  else
    pack_keys_as<V, Mode::convert>(rows, count, width, packed);
}

template <class V, class C>
bool score_by_dtype(const ScoreTask& task, void* memory) {
  if (task.dtype == DType::float32) return score_tiles<V, Mode::plain, C>(task, memory);
  return score_tiles<V, Mode::convert, C>(task, memory);
}

template <class V, class C>
bool score_blocks_by_dtype(const BlockScoreTask& task, void* memory) {
  if (task.score.dtype == DType::float32) return score_blocks<V, Mode::plain, C>(task, memory);
  return score_blocks<V, Mode::convert, C>(task, memory);
}

inline int words_of_floats(DType, int width) { return width; }

template <class V, class C>
constexpr Kernels float32_kernels() {
  Kernels table{};
  table.attend_scratch = attend_scratch;
  table.attend = attend_by_dtype<V>;
  table.narrow_row = narrow;
  table.topk = select_topk<C>;
  table.add_rows = add_rows;
  table.store_row = store_row;
  table.panel_keys = kPanelKeys<V>;
  table.score_queries = V::keys;
  table.key_words = words_of_floats;
  table.pack_keys = pack_keys_by_dtype<V>;
  table.score_scratch = score_scratch<V>;
  table.score = score_by_dtype<V, C>;
  table.block_words = block_words<Mode::plain>;
  table.pack_block = pack_block<Mode::plain>;
  table.score_blocks_scratch = score_blocks_scratch<V>;
  table.score_blocks = score_blocks_by_dtype<V, C>;
  table.group_scratch = group_scratch<V>;
  table.group_tile = group_tile<V>;
  table.nearest_scratch = nearest_scratch<V>;
  table.nearest = nearest<V>;
  table.half_square = half_square;
  table.distances = distances;
  return table;
}

}  // namespace
}  // namespace sparsifiner
