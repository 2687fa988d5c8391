// Sparse attention for CPUs: the public interface of the core. Knows nothing of Python or torch.
//
// Sizes: B batch, H heads, N tokens, D head width, T query tiles, S queries per tile, K kept keys per
// tile, P pooled tail tokens. Functions throw std::invalid_argument or std::out_of_range before they
// touch memory they should not.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/types.h"

namespace sparsifiner {

// Instruction sets, in rising order. `amx_emulated` follows `amx` tile by tile in plain C++. Only builds for tests have
// it; it is never chosen by itself nor listed, only forced.
enum class Level { portable, avx2, avx512, avx512vnni, avx512bf16, amx, amx_emulated };

const char* level_name(Level level);
std::vector<Level> all_levels();        // except amx_emulated
std::string why_not(Level level);       // why it cannot run here, or ""
std::vector<Level> available_levels();  // those that can run here, best last
Level active_level();
std::vector<Precision> available_precisions();  // that make a difference at the active level
void force_level(const std::string& name);      // "" returns to the best one; throws if it is not available

// Rows of D contiguous elements, one per batch, head and token. Strides count elements.
struct Rows {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

struct AttentionShape {
  int64_t batch, heads, tokens, width, tiles, tile_size, kept, pooled, prefix;
};

// out[B, N, H, D] = softmax(scale * q k^T + bias) v over each tile's kept keys and the pooled tail.
struct Attention {
  AttentionShape shape;
  DType dtype;
  float scale;
  Rows q, k, v;
  const int32_t* tile_tokens;        // [T, S], -1 where a tile has no query
  const int32_t* indices;            // [B, H, T, K]
  const float* bias = nullptr;       // [B, H, T, K] or null
  Rows tail_k, tail_v;               // P rows per batch and head
  const float* tail_bias = nullptr;  // [B, H, T, P]
  void* out;                         // [B, N, H, D]
  Precision precision = Precision::same;
};
// Entries whose bias is -inf are not read.
void attend(const Attention& problem, int threads);

// indices[R, k] of the k largest of scores[R, C] (rows `row_stride` elements apart), ascending, plus
// `offset`; equal scores go to the lowest index. Throws std::invalid_argument on NaN.
// With out_stride > k rows of the result are that far apart.
void topk(const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t k,
          int32_t* indices, int64_t out_stride, int32_t offset, int threads);

// The keys each tile needs most, by its pooled queries: softmax(scale * q k^T) over the candidates
// [first, N), merged over the tile's pooled queries by max or sum, and the `count` best selected. Some levels round
// queries and keys first, avx512vnni and avx512bf16 to bytes times a factor of the row and amx to bfloat16: there keys
// whose scores differ by less than that rounding may be taken for each other.
struct TileKeys {
  int64_t batch, heads, tokens, width, tiles, pooled_queries, first, count;
  DType dtype;
  float scale;
  bool sum;
  Rows q;                              // pooled queries, T * pooled_queries rows per batch and head
  Rows k;                              // N rows
  const float* log2_weight = nullptr;  // [B, H, N - first]: added to the log2 probabilities, or null
  int32_t* indices;  // [B, H, T, first + count]: tokens below `first`, then the selected ones, ascending
};
void tile_keys(const TileKeys& problem, int threads);

// The same, but an image's tiles share `total` keys, those of the highest scores in all its tiles and heads: a tile
// gets its best `least` in any case and at most `count`. Lists are padded with a token and a bias of -inf.
struct BudgetKeys {
  TileKeys tiles;
  int64_t least, total;
  float* bias;  // [B, H, T, first + count]: 0 or -inf
};
void budget_keys(const BudgetKeys& problem, int threads);

// Means of `groups` groups of like queries in each tile. The tile's queries start in group_of[tile_size] and
// are regrouped around the means `steps` times (Lloyd); an empty group keeps its mean.
struct TileGroups {
  int64_t batch, heads, tokens, width, tiles, tile_size, groups, steps;
  DType dtype;
  Rows q;
  const int32_t* tile_tokens;  // [T, S], -1 where a tile sticks out: its first token counts again
  const int32_t* group_of;     // [S]
  void* out;                   // [B, H, T, groups, D]
};
void group_queries(const TileGroups& problem, int threads);

// A grid of patches behind `prefix` tokens, cut into blocks of block_rows x block_columns.
struct BlockGrid {
  int64_t prefix, rows, columns, block_rows, block_columns;
  int64_t vertical() const { return (rows + block_rows - 1) / block_rows; }
  int64_t horizontal() const { return (columns + block_columns - 1) / block_columns; }
  int64_t blocks() const { return vertical() * horizontal(); }
  int64_t end_of_band(int64_t band) const {  // the row after it
    return band + 1 < vertical() ? (band + 1) * block_rows : rows;
  }
};

// The same, but only the keys of `num_blocks` blocks of 4 patches are scored one by one, and probabilities are over
// those: the blocks that score best as one key. Its logit is that of the mean key plus the variance that the keys'
// mean square distance from it, spread evenly over their elements, gives the logits; its weight is the highest.
struct ScreenedKeys {
  TileKeys tiles;      // first == grid.prefix
  BlockGrid grid;      // block_rows * block_columns == 4
  int64_t num_blocks;  // must hold `count` keys in any case
};
void screened_keys(const ScreenedKeys& problem, int threads);

// counts[R, P] = log(keys of each block that are not among indices[R, K]); entries whose bias is -inf
// do not count as kept. With `assignment`, the group of each patch by group_patches, groups stand for the blocks: of
// [rows / rows_per_head, patches], one list per `rows_per_head` rows.
void log_counts(const int32_t* indices, const float* bias, int64_t rows, int64_t kept, const BlockGrid& grid,
                const int32_t* assignment, int64_t rows_per_head, float* counts, int threads);

// out[B, H, N] = distance of each row of x from the mean of its block; of prefix rows, their norm.
void block_distances(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                     float* out, int threads);

// out[B, H, P, D] = mean over each block of x.
void pool_blocks(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                 void* out, int threads);

// Groups of patches with like rows. They start as the blocks; `steps` times each patch joins, of its own block's group
// and those around it (3x3), the one with the nearest mean, and the means are taken anew (Lloyd's algorithm). A group
// that lost all its patches keeps its mean.
struct PatchGroups {
  int64_t batch, heads, width, steps;
  DType dtype;
  Rows x;
  BlockGrid grid;
  int32_t* assignment;  // [B, H, rows * columns]
  void* mean;           // [B, H, P, D]
  float* distance;      // [B, H, N]: of each row from the mean of its group; of prefix rows, their norm
};
void group_patches(const PatchGroups& problem, int threads);

// out[B, H, P, D] = mean of x over each of the groups that group_patches made; zeros for a group without patches.
void pool_groups(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                 const int32_t* assignment, void* out, int threads);

}  // namespace sparsifiner
