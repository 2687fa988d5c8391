// Shared by the drivers that score the keys of tiles: checks, rows and tasks.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/sparsifiner.h"

namespace sparsifiner {

inline void check(const TileKeys& p) {
  const int64_t candidates = p.tokens - p.first;
  check_width(p.width);
  if (p.pooled_queries < 1 || p.pooled_queries > kMaxScoreQueries)
    throw std::invalid_argument("a tile must have 1 to 256 pooled queries, got " + std::to_string(p.pooled_queries));
  if (p.count < 1 || p.count > candidates)
    throw std::invalid_argument("cannot select " + std::to_string(p.count) + " of " + std::to_string(candidates) +
                                " keys");
}

// Token `token` of head `head`, counted over all images.
inline const char* row(const TileKeys& p, const Rows& rows, int64_t head, int64_t token) {
  return static_cast<const char*>(rows.data) +
         element_size(p.dtype) *
             (head / p.heads * rows.batch_stride + head % p.heads * rows.head_stride + token * rows.token_stride);
}

// Number of tiles that are scored in one task, so that their logits for `columns` keys stay in the second-level cache.
// Whole batches of queries where that is possible: one that is not full costs as much as one that is.
inline int64_t tiles_per_task(const Kernels& kernel, const TileKeys& p, int64_t columns) {
  constexpr int64_t logit_bytes = 384 * 1024;
  const int64_t batch = (kernel.score_queries + p.pooled_queries - 1) / p.pooled_queries;
  const int64_t fitting = logit_bytes / (4 * columns * p.pooled_queries) / batch * batch;
  return std::min({std::max(fitting, batch), std::max<int64_t>(1, kMaxScoreQueries / p.pooled_queries), p.tiles});
}

// `tiles` tiles of `head` from `start`, whose pooled queries go to `q`. What every tile keeps is written at once.
inline ScoreTask task_of(const TileKeys& p, int64_t head, int64_t start, int64_t tiles, const void** q) {
  ScoreTask task{};
  task.dtype = p.dtype;
  task.width = static_cast<int>(p.width);
  task.tiles = static_cast<int>(tiles);
  task.pooled_queries = static_cast<int>(p.pooled_queries);
  task.scale = p.scale;
  task.sum = p.sum;
  for (int64_t i = 0; i < tiles * p.pooled_queries; ++i) q[i] = row(p, p.q, head, start * p.pooled_queries + i);
  task.q = q;
  task.count = p.count;
  task.out_stride = p.first + p.count;
  int32_t* indices = p.indices + (head * p.tiles + start) * task.out_stride;
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t i = 0; i < p.first; ++i) indices[tile * task.out_stride + i] = static_cast<int32_t>(i);
  task.indices = indices + p.first;
  return task;
}

inline std::invalid_argument not_a_number(int64_t tile) {
  return not_a_number("the scores of tile " + std::to_string(tile) + " or a neighbour hold");
}

}  // namespace sparsifiner
