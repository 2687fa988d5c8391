// Scores and selects the keys of all tiles in two stages: blocks of 4 keys by their mean, then the keys of the best
// blocks. Keys are read once, for both.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "core/shared_buffer.h"
#include "drivers/tile_keys.h"

namespace sparsifiner {
namespace {

void check(const ScreenedKeys& p) {
  const TileKeys& t = p.tiles;
  check(t);
  if (p.grid.block_rows * p.grid.block_columns != kBlockKeys)
    throw std::invalid_argument("a block must have 4 places, not " + std::to_string(p.grid.block_rows) + " x " +
                                std::to_string(p.grid.block_columns));
  if (t.first != p.grid.prefix || t.tokens != t.first + p.grid.rows * p.grid.columns)
    throw std::invalid_argument("the candidates must be the patches of the grid");
  const int64_t empty = p.grid.blocks() * kBlockKeys - (t.tokens - t.first);
  if (p.num_blocks > p.grid.blocks() || p.num_blocks * kBlockKeys - empty < t.count)
    throw std::invalid_argument(std::to_string(p.num_blocks) + " of " + std::to_string(p.grid.blocks()) +
                                " blocks may hold fewer than " + std::to_string(t.count) + " keys");
}

// patch[block][slot] of the grid, row by row, or -1 where a block sticks out.
std::vector<int32_t> patches_of_blocks(const BlockGrid& grid) {
  std::vector<int32_t> patches;
  patches.reserve(static_cast<std::size_t>(grid.blocks() * kBlockKeys));
  for (int64_t top = 0; top < grid.rows; top += grid.block_rows)
    for (int64_t left = 0; left < grid.columns; left += grid.block_columns)
      for (int64_t i = 0; i < kBlockKeys; ++i) {
        const int64_t y = top + i / grid.block_columns, x = left + i % grid.block_columns;
        patches.push_back(y < grid.rows && x < grid.columns ? static_cast<int32_t>(y * grid.columns + x) : -1);
      }
  return patches;
}

// The keys of all blocks of one head and what is known of each block.
struct Head {
  char* means;     // packed by pack_keys
  char* keys;      // packed by pack_block
  float* weight;   // [blocks][kBlockKeys], -inf where a block sticks out
  float* highest;  // [blocks]: of these weights
  float* spread;   // [blocks]
};

// Packs `count` blocks from `first` and the means of their keys.
void pack_blocks(const ScreenedKeys& p, const Kernels& kernel, const int32_t* patches, int64_t head, int64_t first,
                 int64_t count, const Head& to) {
  const TileKeys& t = p.tiles;
  const int width = static_cast<int>(t.width);
  const int64_t mean_bytes = element_size(t.dtype) * t.width,
                block_bytes = kernel.block_words(t.dtype, width) * kBlockKeys * 4;
  const float* log2_weight = t.log2_weight ? t.log2_weight + head * (t.tokens - t.first) : nullptr;
  alignas(64) char mean[kMaxPanelKeys * kMaxWidth * 4];
  const void* means[kMaxPanelKeys];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = first + i;
    const void* rows[kBlockKeys];
    constexpr int64_t ahead = 3;  // blocks whose rows are fetched while earlier ones are packed
    for (int64_t slot = 0; i + ahead < count && slot < kBlockKeys; ++slot)
      if (const int32_t patch = patches[(block + ahead) * kBlockKeys + slot]; patch >= 0)
        for (int64_t byte = 0; byte < mean_bytes; byte += 64)
          __builtin_prefetch(row(t, t.k, head, t.first + patch) + byte);
    float* weight = to.weight + block * kBlockKeys;
    to.highest[block] = -INFINITY;
    for (int64_t slot = 0; slot < kBlockKeys; ++slot) {
      const int32_t patch = patches[block * kBlockKeys + slot];
      rows[slot] = patch < 0 ? nullptr : row(t, t.k, head, t.first + patch);
      weight[slot] = patch < 0 ? -INFINITY : log2_weight ? log2_weight[patch] : 0.0f;
      to.highest[block] = std::max(to.highest[block], weight[slot]);
    }
    means[i] = mean + i * mean_bytes;
    kernel.pack_block(rows, t.dtype, width, to.keys + block * block_bytes, mean + i * mean_bytes, to.spread + block);
  }
  const int64_t group_bytes = kernel.panel_keys * kernel.key_words(t.dtype, width) * 4;
  kernel.pack_keys(means, t.dtype, static_cast<int>(count), width, to.means + first / kernel.panel_keys * group_bytes);
}

// Replaces slots of blocks by tokens, ascending. `bitmap` has a bit for every patch.
void slots_to_tokens(const ScreenedKeys& p, const int32_t* patches, const int32_t* blocks, uint64_t* bitmap,
                     int32_t* indices) {
  const int64_t words = (p.grid.rows * p.grid.columns + 63) / 64;
  std::fill(bitmap, bitmap + words, 0);
  for (int64_t i = 0; i < p.tiles.count; ++i) {
    const uint32_t slot = static_cast<uint32_t>(indices[i]);
    const uint32_t patch =
        static_cast<uint32_t>(patches[blocks[slot / kBlockKeys] * kBlockKeys + static_cast<int>(slot % kBlockKeys)]);
    bitmap[patch / 64] |= uint64_t{1} << patch % 64;
  }
  for (int64_t word = 0; word < words; ++word)
    for (uint64_t bits = bitmap[word]; bits != 0; bits &= bits - 1)
      *indices++ = static_cast<int32_t>(p.grid.prefix + 64 * word + __builtin_ctzll(bits));
}

}  // namespace

void screened_keys(const ScreenedKeys& p, int threads) {
  check(p);
  const TileKeys& t = p.tiles;
  const Kernels& kernel = kernels();
  const int width = static_cast<int>(t.width);
  const int64_t heads = t.batch * t.heads, blocks = p.grid.blocks(), panel_keys = kernel.panel_keys;
  const int64_t groups_of_means = (blocks + panel_keys - 1) / panel_keys;
  const int64_t means_bytes = groups_of_means * panel_keys * kernel.key_words(t.dtype, width) * 4;
  const int64_t keys_bytes = blocks * kBlockKeys * kernel.block_words(t.dtype, width) * 4;
  const SharedBuffer means = allocate(heads * means_bytes), keys = allocate(heads * keys_bytes);
  const SharedBuffer facts = allocate(heads * blocks * (kBlockKeys + 2) * 4);
  const auto head_of = [&](int64_t head) {
    float* weight = reinterpret_cast<float*>(facts.get()) + head * blocks * (kBlockKeys + 2);
    return Head{means.get() + head * means_bytes, keys.get() + head * keys_bytes, weight, weight + blocks * kBlockKeys,
                weight + blocks * (kBlockKeys + 1)};
  };
  const std::vector<int32_t> patches = patches_of_blocks(p.grid);
  parallel_for(heads * groups_of_means, threads, [&](int64_t item) {
    const int64_t head = item / groups_of_means, first = item % groups_of_means * panel_keys;
    pack_blocks(p, kernel, patches.data(), head, first, std::min(panel_keys, blocks - first), head_of(head));
  });

  const int64_t group = tiles_per_task(kernel, t, groups_of_means * panel_keys), groups = (t.tiles + group - 1) / group;
  parallel_for(heads * groups, threads, [&](int64_t item) {
    const int64_t number = item / groups, start = item % groups * group, tiles = std::min(group, t.tiles - start);
    const Head head = head_of(number);
    const void* q[kMaxScoreQueries];
    const ScoreTask all_keys = task_of(t, number, start, tiles, q);
    ScoreTask first = all_keys;
    first.candidates = blocks;
    first.log2_weight = t.log2_weight ? head.highest : nullptr;
    first.spread = head.spread;
    first.packed_keys = head.means;
    first.count = first.out_stride = p.num_blocks;
    BlockScoreTask second{};
    second.score = all_keys;
    second.score.tiles = 1;
    second.score.candidates = p.num_blocks * kBlockKeys;
    second.score.packed_keys = head.keys;
    second.log2_weight = head.weight;

    const auto rounded = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    const std::size_t list_bytes = rounded(static_cast<std::size_t>(tiles * p.num_blocks * 4));
    const std::size_t bit_bytes = rounded(static_cast<std::size_t>(t.tokens + 63) / 8);
    const std::size_t kernel_bytes = std::max(kernel.score_scratch(first), kernel.score_blocks_scratch(second));
    char* memory = static_cast<char*>(scratch(list_bytes + bit_bytes + kernel_bytes));
    int32_t* lists = reinterpret_cast<int32_t*>(memory);
    first.indices = lists;
    if (!kernel.score(first, memory + list_bytes + bit_bytes)) throw not_a_number(start);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      second.blocks = lists + tile * p.num_blocks;
      second.score.q = q + tile * t.pooled_queries;
      second.score.indices = all_keys.indices + tile * all_keys.out_stride;
      if (!kernel.score_blocks(second, memory + list_bytes + bit_bytes)) throw not_a_number(start + tile);
      slots_to_tokens(p, patches.data(), second.blocks, reinterpret_cast<uint64_t*>(memory + list_bytes),
                      second.score.indices);
    }
  });
}

}  // namespace sparsifiner
