// Scores and selects the keys of all tiles: keys are transposed once per head, then a few tiles at a time.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace sparsifiner {
namespace {

// Logits that should stay in the second-level cache, in bytes.
constexpr int64_t kLogitBytes = 384 * 1024;

const char* row(const Rows& rows, int64_t element, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const char*>(rows.data) +
         element * (batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride);
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

}  // namespace

void tile_keys(const TileKeys& p, int threads) {
  const int64_t candidates = p.tokens - p.first, heads = p.batch * p.heads;
  if (p.width < 16 || p.width > 128 || p.width % 16 != 0)
    throw std::invalid_argument("head width must be a multiple of 16 from 16 to 128, got " + std::to_string(p.width));
  if (p.members < 1 || p.members > kMaxScoreQueries)
    throw std::invalid_argument("a tile must have 1 to 256 pooled queries, got " + std::to_string(p.members));
  if (p.count < 1 || p.count > candidates)
    throw std::invalid_argument("cannot select " + std::to_string(p.count) + " of " + std::to_string(candidates) + " keys");

  const Kernels& kernel = kernels();
  const int64_t element = p.dtype == DType::float32 ? 4 : 2, block = kernel.key_block;
  const int64_t blocks = (candidates + block - 1) / block, step = block * kernel.key_words(p.dtype, static_cast<int>(p.width)) * 4;
  std::unique_ptr<char, Free> packed(
      static_cast<char*>(std::aligned_alloc(64, static_cast<std::size_t>(heads * blocks * step))));
  if (!packed) throw std::bad_alloc();

  parallel_for(heads * blocks, threads, [&](int64_t item) {
    const int64_t head = item / blocks, first = item % blocks * block;
    const int count = static_cast<int>(std::min(block, candidates - first));
    const void* rows[64];
    for (int i = 0; i < count; ++i) rows[i] = row(p.k, element, head / p.heads, head % p.heads, p.first + first + i);
    kernel.pack_keys(rows, p.dtype, count, static_cast<int>(p.width), packed.get() + item * step);
  });

  // Whole batches of queries where that is possible: one that is not full costs as much as one that is.
  const int64_t batch = (kernel.score_queries + p.members - 1) / p.members;
  const int64_t fitting = kLogitBytes / (4 * blocks * block * p.members) / batch * batch;
  const int64_t group = std::min({std::max(fitting, batch), std::max<int64_t>(1, kMaxScoreQueries / p.members), p.tiles});
  const int64_t groups = (p.tiles + group - 1) / group, stride = p.first + p.count;
  parallel_for(heads * groups, threads, [&](int64_t item) {
    const int64_t head = item / groups, start = item % groups * group;
    const void* q[kMaxScoreQueries];
    ScoreTask task;
    task.dtype = p.dtype;
    task.width = static_cast<int>(p.width);
    task.tiles = static_cast<int>(std::min(group, p.tiles - start));
    task.members = static_cast<int>(p.members);
    task.candidates = candidates;
    task.scale = p.scale;
    task.sum = p.sum;
    task.log2_weight = p.log2_weight ? p.log2_weight + head * candidates : nullptr;
    task.packed_keys = packed.get() + head * blocks * step;
    for (int i = 0; i < task.tiles * task.members; ++i)
      q[i] = row(p.q, element, head / p.heads, head % p.heads, start * p.members + i);
    task.q = q;
    task.count = p.count;
    task.offset = static_cast<int32_t>(p.first);
    int32_t* indices = p.indices + (head * p.tiles + start) * stride;
    for (int tile = 0; tile < task.tiles; ++tile)
      for (int64_t i = 0; i < p.first; ++i) indices[tile * stride + i] = static_cast<int32_t>(i);
    task.indices = indices + p.first;
    task.out_stride = stride;
    if (!kernel.score(task, scratch(kernel.score_scratch(task))))
      throw std::invalid_argument("the scores of tile " + std::to_string(start) + " or a neighbour hold NaN");
  });
}

}  // namespace sparsifiner
