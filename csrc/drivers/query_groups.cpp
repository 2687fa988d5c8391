// Representative queries of all tiles.
#include <stdexcept>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/sparsifiner.h"

namespace sparsifiner {

void group_queries(const TileGroups& p, int threads) {
  check_width(p.width);
  for (int64_t i = 0; i < p.tiles * p.tile_size; ++i)
    if (p.tile_tokens[i] >= p.tokens || (i % p.tile_size == 0 && p.tile_tokens[i] < 0))
      throw std::out_of_range("tile tokens must lie in [0, " + std::to_string(p.tokens) +
                              "), the first of a tile always");
  for (int64_t s = 0; s < p.tile_size; ++s)
    if (p.group_of[s] < 0 || p.group_of[s] >= p.groups)
      throw std::out_of_range("group numbers must lie in [0, groups)");
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

}  // namespace sparsifiner
