// Scores and selects the keys of all tiles: keys are transposed once per head, then a few tiles at a time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

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

// Integers that order like the floats; there is no NaN among them.
uint32_t ordered(float score) {
  uint32_t bits;
  score += 0.0f;  // -0 becomes 0
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The lowest score that is among the `total` best of `lists` lists of `count`, and how many equal to it are.
struct Threshold {
  uint32_t score;
  int64_t ties;
};

// Digit by digit, from the highest: one pass over the scores each.
Threshold find_threshold(const float* scores, int64_t lists, int64_t count, int64_t total, int threads) {
  constexpr int kMostBins = 4096;
  constexpr struct {
    int shift, bits;
  } digits[] = {{20, 12}, {8, 12}, {0, 8}};
  const int64_t chunks = std::min<int64_t>(lists, 64), step = (lists + chunks - 1) / chunks;
  const SharedBuffer memory = allocate(chunks * kMostBins * static_cast<int64_t>(sizeof(int32_t)));
  int32_t* sizes = reinterpret_cast<int32_t*>(memory.get());
  Threshold found{0, total};
  uint32_t known = 0;  // bits of found.score that are final
  for (const auto& digit : digits) {
    const uint32_t mask = (1u << digit.bits) - 1;
    parallel_for(chunks, threads, [&](int64_t chunk) {
      int32_t* of_chunk = sizes + chunk * kMostBins;
      std::fill_n(of_chunk, kMostBins, 0);
      for (int64_t i = chunk * step * count; i < std::min(lists, (chunk + 1) * step) * count; ++i) {
        const uint32_t key = ordered(scores[i]);
        if ((key & known) == found.score) ++of_chunk[key >> digit.shift & mask];
      }
    });
    for (uint32_t bin = mask;; --bin) {
      int64_t size = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) size += sizes[chunk * kMostBins + bin];
      if (found.ties <= size || bin == 0) {
        found.score |= bin << digit.shift;
        break;
      }
      found.ties -= size;
    }
    known |= mask << digit.shift;
  }
  return found;
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
  std::vector<int64_t> ties(static_cast<std::size_t>(tiles));
  for (int64_t image = 0; image < t.batch; ++image) {
    const float* of_image = scores + image * tiles * t.count;
    const Threshold threshold = find_threshold(of_image, tiles, t.count, p.total, threads);
    // Equal scores count from the first tile on.
    parallel_for(tiles, threads, [&](int64_t tile) {
      const float* of_tile = of_image + tile * t.count;
      ties[static_cast<std::size_t>(tile)] =
          std::count_if(of_tile, of_tile + t.count, [&](float score) { return ordered(score) == threshold.score; });
    });
    int64_t left = threshold.ties;
    for (int64_t& of_tile : ties) {
      of_tile = std::min(of_tile, left);
      left -= of_tile;
    }
    parallel_for(tiles, threads, [&](int64_t tile) {
      const float* of_tile = of_image + tile * t.count;
      int32_t* indices = t.indices + (image * tiles + tile) * width;
      float* bias = p.bias + (image * tiles + tile) * width;
      int64_t n = t.first, equal = ties[static_cast<std::size_t>(tile)];
      for (int64_t i = 0; i < t.count; ++i) {
        const uint32_t key = ordered(of_tile[i]);
        const bool tie = key == threshold.score && equal > 0;
        equal -= tie;
        indices[n] = indices[t.first + i];
        n += (key > threshold.score) | tie;
      }
      std::fill_n(bias, n, 0.0f);
      std::fill(bias + n, bias + width, -INFINITY);
      std::fill(indices + n, indices + width, 0);
    });
  }
}

}  // namespace sparsifiner
