// Scores and selects the keys of all tiles: keys are transposed once per head, then a few tiles at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "core/shared_buffer.h"
#include "drivers/tile_keys.h"

namespace sparsifiner {
namespace {

// `scores` [B, H, T, count] of the selected keys, or null.
void select(const TileKeys& p, float* scores, int threads) {
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
    if (scores != nullptr) task.scores = scores + (head * p.tiles + start) * p.count;
    if (!kernel.score(task, scratch(kernel.score_scratch(task)))) throw not_a_number(start);
  });
}

// The `total` best of an image's scores: their positions, ascending.
SharedBuffer best_of_image(const BudgetKeys& p, const float* scores) {
  const int64_t columns = p.tiles.heads * p.tiles.tiles * p.tiles.count;
  SharedBuffer kept = allocate(4 * std::max<int64_t>(1, p.total));
  const SharedBuffer scratch = allocate(static_cast<int64_t>(topk_scratch(columns)));
  int32_t* list = reinterpret_cast<int32_t*>(kept.get());
  if (p.total > 0 && !kernels().topk(scores, DType::float32, columns, p.total, 0, list, scratch.get()))
    throw not_a_number("the scores hold");
  return kept;
}

}  // namespace

void tile_keys(const TileKeys& p, int threads) { select(p, nullptr, threads); }

void budget_keys(const BudgetKeys& p, int threads) {
  const TileKeys& t = p.tiles;
  check(t);
  const int64_t tiles = t.heads * t.tiles;  // of an image
  if (p.least < 0 || p.least > t.count)
    throw std::invalid_argument("a tile must keep from 0 to " + std::to_string(t.count) + " keys at least, got " +
                                std::to_string(p.least));
  if (p.total < tiles * p.least || p.total > tiles * t.count)
    throw std::invalid_argument("an image must have from " + std::to_string(tiles * p.least) + " to " +
                                std::to_string(tiles * t.count) + " keys, got " + std::to_string(p.total));
  if (tiles * t.count > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("too many keys of an image for 32-bit numbers");
  const SharedBuffer memory = allocate(std::max<int64_t>(1, t.batch * tiles * t.count * 4));
  float* scores = reinterpret_cast<float*>(memory.get());
  select(t, scores, threads);
  const Kernels& kernel = kernels();
  if (p.least > 0)
    parallel_for(t.batch * tiles, threads, [&](int64_t tile) {
      float* of_tile = scores + tile * t.count;
      const std::size_t list_bytes = (static_cast<std::size_t>(p.least) * 4 + 63) / 64 * 64;
      char* memory = static_cast<char*>(scratch(list_bytes + topk_scratch(t.count)));
      int32_t* best = reinterpret_cast<int32_t*>(memory);
      kernel.topk(of_tile, DType::float32, t.count, p.least, 0, best, memory + list_bytes);
      for (int64_t i = 0; i < p.least; ++i) of_tile[best[i]] = std::numeric_limits<float>::infinity();
    });
  const int64_t width = t.first + t.count;
  for (int64_t image = 0; image < t.batch; ++image) {
    const SharedBuffer list = best_of_image(p, scores + image * tiles * t.count);
    const int32_t* kept = reinterpret_cast<const int32_t*>(list.get());
    parallel_for(tiles, threads, [&](int64_t tile) {
      int32_t* indices = t.indices + (image * tiles + tile) * width;
      float* bias = p.bias + (image * tiles + tile) * width;
      const int64_t start = tile * t.count;
      const int32_t* next = std::lower_bound(kept, kept + p.total, static_cast<int32_t>(start));
      int64_t n = t.first;
      for (; next != kept + p.total && *next < start + t.count; ++next) indices[n++] = indices[t.first + *next - start];
      std::fill_n(bias, n, 0.0f);
      std::fill(bias + n, bias + width, -INFINITY);
      std::fill(indices + n, indices + width, 0);
    });
  }
}

}  // namespace sparsifiner
