// Representative queries of all tiles, and distances of values from their block's mean: checks, and the loops.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "inputs.h"
#include "kernels.h"
#include "parallel.h"

namespace sparsifiner {
void group_queries(const TileGroups& p, int threads) {
  check_width(p.width);
  for (int64_t i = 0; i < p.tiles * p.tile_size; ++i)
    if (p.tile_tokens[i] >= p.tokens || (i % p.tile_size == 0 && p.tile_tokens[i] < 0))
      throw std::out_of_range("tile tokens must lie in [0, " + std::to_string(p.tokens) + "), the first of a tile always");
  for (int64_t s = 0; s < p.tile_size; ++s)
    if (p.group_of[s] < 0 || p.group_of[s] >= p.groups) throw std::out_of_range("group numbers must lie in [0, groups)");
  const Kernels& kernel = kernels();
  const int64_t element = element_size(p.dtype);
  parallel_for(p.batch * p.heads * p.tiles, threads, [&](int64_t item) {
    const int64_t head = item / p.tiles, tile = item % p.tiles;
    const int32_t* tokens = p.tile_tokens + tile * p.tile_size;
    thread_local std::vector<const void*> rows;
    rows.resize(static_cast<std::size_t>(p.tile_size));
    for (int64_t s = 0; s < p.tile_size; ++s) {
      // Where a border tile sticks out, its first token stands again.
      const int64_t token = tokens[s] < 0 ? tokens[0] : tokens[s];
      const int64_t offset =
          head / p.heads * p.q.batch_stride + head % p.heads * p.q.head_stride + token * p.q.token_stride;
      rows[static_cast<std::size_t>(s)] = static_cast<const char*>(p.q.data) + element * offset;
    }
    GroupTask task;
    task.dtype = p.dtype;
    task.width = static_cast<int>(p.width);
    task.queries = static_cast<int>(p.tile_size);
    task.groups = static_cast<int>(p.groups);
    task.steps = static_cast<int>(p.steps);
    task.q = rows.data();
    task.group_of = p.group_of;
    task.out = static_cast<char*>(p.out) + element * item * p.groups * p.width;
    kernel.group_tile(task, scratch(kernel.group_scratch(task)));
  });
}

void block_distances(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                     float* out, int threads) {
  check_width(width);
  const Kernels& kernel = kernels();
  const int64_t tokens = grid.prefix + grid.rows * grid.columns;
  parallel_for(batch * heads * (grid.vertical() + 1), threads, [&](int64_t item) {
    const int64_t head = item / (grid.vertical() + 1), by = item % (grid.vertical() + 1) - 1;
    const char* from = static_cast<const char*>(x.data) +
                       element_size(dtype) * (head / heads * x.batch_stride + head % heads * x.head_stride);
    float* to = out + head * tokens;
    if (by < 0) {  // prefix tokens lie in no block: their distance is that from zero
      const float zero[kMaxWidth] = {};
      kernel.distances(from, dtype, grid.prefix, x.token_stride, width, zero, to);
      return;
    }
    const int64_t top = by * grid.block_rows, bottom = std::min(grid.rows, top + grid.block_rows);
    for (int64_t left = 0; left < grid.columns; left += grid.block_columns) {
      const int64_t right = std::min(grid.columns, left + grid.block_columns);
      float mean[kMaxWidth] = {};
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t token = grid.prefix + y * grid.columns + left;
        kernel.add_rows(from + element_size(dtype) * token * x.token_stride, dtype, right - left, x.token_stride, width, mean);
      }
      for (int64_t d = 0; d < width; ++d) mean[d] /= static_cast<float>((bottom - top) * (right - left));
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t token = grid.prefix + y * grid.columns + left;
        kernel.distances(from + element_size(dtype) * token * x.token_stride, dtype, right - left, x.token_stride, width, mean,
                         to + token);
      }
    }
  });
}

}  // namespace sparsifiner
