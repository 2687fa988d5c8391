// Scores and selects the keys of all tiles: keys are transposed once per head, then a few tiles at a time.
#include <algorithm>

#include "core/parallel.h"
#include "core/shared_buffer.h"
#include "drivers/tile_keys.h"

namespace sparsifiner {

void tile_keys(const TileKeys& p, int threads) {
  check(p);
  const int64_t candidates = p.tokens - p.first, heads = p.batch * p.heads;
  const Kernels& kernel = kernels();
  const int64_t block = kernel.panel_keys, blocks = (candidates + block - 1) / block;
  const int64_t step = block * kernel.key_words(p.dtype, static_cast<int>(p.width)) * 4;
  const int64_t row_bytes = p.width * element_size(p.dtype);
  const SharedBuffer packed = allocate(heads * blocks * step);
  parallel_for(heads * blocks, threads, [&](int64_t item) {
    const int64_t head = item / blocks, first = item % blocks * block;
    const int count = static_cast<int>(std::min(block, candidates - first));
    const void* rows[kMaxPanelKeys];
    for (int i = 0; i < count; ++i) {
      rows[i] = row(p, p.k, head, p.first + first + i);
      // Rows of the packed projection lie a page or more apart, where the CPU does not foresee the next one.
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(rows[i]) + byte);
    }
    kernel.pack_keys(rows, p.dtype, count, static_cast<int>(p.width), packed.get() + item * step);
  });

  const int64_t group = tiles_per_task(kernel, p, blocks * block), groups = (p.tiles + group - 1) / group;
  parallel_for(heads * groups, threads, [&](int64_t item) {
    const int64_t head = item / groups, start = item % groups * group;
    const void* q[kMaxScoreQueries];
    ScoreTask task = task_of(p, head, start, std::min(group, p.tiles - start), q);
    task.candidates = candidates;
    task.log2_weight = p.log2_weight ? p.log2_weight + head * candidates : nullptr;
    task.packed_keys = packed.get() + head * blocks * step;
    task.offset = static_cast<int32_t>(p.first);
    if (!kernel.score(task, scratch(kernel.score_scratch(task)))) throw not_a_number(start);
  });
}

}  // namespace sparsifiner
