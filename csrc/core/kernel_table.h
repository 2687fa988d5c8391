// What each instruction set provides. The level_*.cpp files are compiled with flags the caller's CPU may
// not have, so they see plain pointers only: an inline function of the standard library instantiated
// there could be linked into code that runs everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace sparsifiner {

// Some queries that attend to one list of keys. Rows are D contiguous elements of `dtype`.
struct TileTask {
  DType dtype;  // of the rows of q, k and v
  DType out_dtype;
  int width, queries, keys;
  float scale;
  const void* const* q;     // [queries]
  const void* const* k;     // [keys]
  const void* const* v;     // [keys]
  const float* bias;        // [keys], added to the logits, or null
  void* const* out;         // [queries]
  const float* key_scales;  // [keys], with int8 keys only
};

// Some tiles of one head that score every candidate key by their pooled queries.
struct ScoreTask {
  DType dtype;
  int width, tiles, pooled_queries;  // pooled queries per tile
  int64_t candidates;
  float scale;
  bool sum;                  // merge the pooled queries' probabilities by sum instead of max
  const float* log2_weight;  // added to the candidates' log2 probabilities, or null
  const float* spread;       // candidates are means of keys: mean square distance of those from it per element, or null
  const void* packed_keys;   // panels of `panel_keys` keys from pack_keys
  const void* const* q;      // [tiles * pooled_queries], at most kMaxScoreQueries
  int64_t count;             // keys to select
  int32_t offset;            // added to the selected candidates' numbers
  int32_t* indices;          // [tiles][out_stride]
  int64_t out_stride;
  float* scores;  // [tiles][count]: of the selected keys, or null
};

// One tile that scores the keys of some blocks of kBlockKeys keys only: `candidates` counts all slots of these blocks,
// and indices are numbers of slots.
struct BlockScoreTask {
  ScoreTask score;           // packed_keys: from pack_block, for all blocks of the head; no log2_weight, no spread
  const int32_t* blocks;     // [candidates / kBlockKeys]
  const float* log2_weight;  // [all blocks][kBlockKeys], -inf where a block has no key
};

struct GroupTask {
  DType dtype;
  int width, queries, groups, steps;
  const void* const* q;     // [queries]
  const int32_t* group_of;  // [queries]: the group each starts in
  void* out;                // [groups][width]
};

// Some rows, each of which joins the nearest of a few means and is added to what becomes that group's next mean.
struct NearestTask {
  DType dtype;
  int width, count, candidates;
  const void* const* rows;    // [count]
  const float* const* means;  // [candidates], each [width]
  const float* half_squares;  // [candidates]: |mean|^2 / 2
  float* const* sums;         // [candidates], each [width]
  int32_t* nearest;           // [count]: number of the nearest candidate, the first of equally near ones
};

constexpr int kMaxScoreQueries = 256;
constexpr int kBlockKeys = 4;
constexpr int kMaxPanelKeys = 64;

struct Kernels {
  std::size_t (*attend_scratch)(const TileTask& task);
  void (*attend)(const TileTask& task, void* scratch);
  bool bfloat16_products;  // `attend` multiplies bfloat16 rows without widening them
  // The same with float32 q and v, and k rounded by round_key: as integers, 128 added to each. Null where there are no
  // products of bytes.
  void (*attend_int8)(const TileTask& task, void* scratch);
  void (*round_key)(const float* row, const float* offset, int width, uint8_t* out, float* scale);
  void (*narrow_row)(const float* from, uint16_t* to, int count);  // to bfloat16
  // Returns false if a score is NaN. `scratch` holds `topk_scratch(columns)` bytes.
  bool (*topk)(const void* scores, DType dtype, int64_t columns, int64_t k, int32_t offset, int32_t* indices,
               void* scratch);
  // sum[0:width] += row[0:width] for `rows` rows `stride` elements apart, then out = sum * factor.
  void (*add_rows)(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width, float* sum);
  void (*store_row)(const float* sum, float factor, int64_t width, DType dtype, void* out);
  int panel_keys;
  int score_queries;                         // pooled queries that `score` multiplies with a block of keys at once
  int (*key_words)(DType dtype, int width);  // 32-bit words of a packed key
  void (*pack_keys)(const void* const* rows, DType dtype, int count, int width, void* packed);
  std::size_t (*score_scratch)(const ScoreTask& task);
  bool (*score)(const ScoreTask& task, void* scratch);  // false if a score is NaN
  int (*block_words)(DType dtype, int width);           // 32-bit words of a key packed by pack_block
  void (*pack_block)(const void* const* rows, DType dtype, int width, void* packed, void* mean, float* spread);
  std::size_t (*score_blocks_scratch)(const BlockScoreTask& task);
  bool (*score_blocks)(const BlockScoreTask& task, void* scratch);  // false if a score is NaN
  std::size_t (*group_scratch)(const GroupTask& task);
  void (*group_tile)(const GroupTask& task, void* scratch);
  std::size_t (*nearest_scratch)(const NearestTask& task);
  void (*nearest)(const NearestTask& task, void* scratch);
  float (*half_square)(const float* row, int width);  // |row|^2 / 2
  void (*distances)(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width, const float* mean,
                    float* out);
};

inline std::size_t topk_scratch(int64_t columns) { return static_cast<std::size_t>(columns + 64) * 8; }

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels avx512bf16_kernels;
extern const Kernels amx_kernels;
extern const Kernels amx_emulated_kernels;

const Kernels& kernels();  // of the active level

}  // namespace sparsifiner
