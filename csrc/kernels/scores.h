// Keys that a few tiles need most: pooled queries against every candidate key, softmax, merged per tile,
// best keys selected, all while the scores are in the cache.
//
// Here the keys lie in the lanes: they are transposed once per head, in panels of `panel_keys` keys. Where the
// instruction set has products of fewer bits, keys and queries are rounded to those (int8_scores.h, or bfloat16
// in amx.h): only the order of the scores counts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bump_allocator.h"
#include "core/kernel_table.h"
#include "kernels/attend.h"
#include "kernels/topk.h"

namespace sparsifiner {
namespace {

template <class V>
constexpr int kPanelKeys = V::vectors * V::lanes;

// keys[words][panel_keys] from `count` <= panel_keys rows; lanes beyond hold zeros.
template <class V, Mode mode>
inline void pack_keys_as(const void* const* rows, int count, int width, void* packed) {
  TileTask task{};
  task.width = width;
  task.q = rows;
  transpose_queries<V, mode, V::vectors>(task, 0, count, static_cast<uint32_t*>(packed));
}

// A row as pairs of bfloat16: itself, or rounded into `buffer`.
inline const uint32_t* row_of_pairs(const void* row, DType dtype, int width, uint32_t* buffer) {
  if (dtype == DType::bfloat16) return static_cast<const uint32_t*>(row);
  narrow(static_cast<const float*>(row), reinterpret_cast<uint16_t*>(buffer), width);
  return buffer;
}

inline int64_t score_columns(const ScoreTask& t, int block) { return (t.candidates + block - 1) / block * block; }

struct ScoreBuffers {
  int64_t columns;  // candidates, padded to full panels
  float* logits;    // [padded queries][columns]
  float* merged;    // [columns]
  uint32_t* rows;   // [padded queries][D], where a mode copies the queries
  float* weights;   // [columns]
  void* topk;
};

// Lays out scratch for a number of queries padded to a multiple of `multiple`; returns the bytes it takes.
template <class V>
inline std::size_t score_layout(const ScoreTask& t, int multiple, char* base, ScoreBuffers* b) {
  const int padded = (t.tiles * t.pooled_queries + multiple - 1) / multiple * multiple;
  b->columns = score_columns(t, kPanelKeys<V>);
  const std::size_t columns = static_cast<std::size_t>(b->columns), queries = static_cast<std::size_t>(padded);
  BumpAllocator allocator{base};
  b->logits = allocator.allocate<float>(queries * columns);
  b->merged = allocator.allocate<float>(columns);
  b->rows = allocator.allocate<uint32_t>(queries * static_cast<std::size_t>(t.width));
  b->weights = allocator.allocate<float>(columns);
  b->topk = allocator.allocate<char>(topk_scratch(t.candidates));
  return allocator.used;
}

template <class V>
inline std::size_t score_scratch(const ScoreTask& t) {
  ScoreBuffers b;
  return score_layout<V>(t, V::keys, nullptr, &b);
}

// log2 of the sum of 2^x over a row, NaN if it holds one.
template <class V, bool coarse>
inline float log2_sum(const float* row, int64_t columns) {
  using F = typename V::F;
  constexpr int L = V::lanes;
  F max = V::set(-3.402823466e38f), sum = V::set(0.0f);
  for (int64_t c = 0; c < columns; c += L) max = V::max(V::load(row + c), max);
  float lane[L];
  V::store(lane, max);
  float highest = lane[0];
  for (int i = 1; i < L; ++i) highest = lane[i] > highest ? lane[i] : highest;
  for (int64_t c = 0; c < columns; c += L)
    sum = V::add(sum, V::template exp2<coarse>(V::sub(V::load(row + c), V::set(highest))));
  V::store(lane, sum);
  float total = 0.0f;
  for (int i = 0; i < L; ++i) total += lane[i];
  return highest + __builtin_log2f(total);
}

inline float square_norm(const void* row, DType dtype, int width) {
  float sum = 0.0f;
  for (int d = 0; d < width; ++d) {
    const float x = dtype == DType::float32
                        ? static_cast<const float*>(row)[d]
                        : from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(row)[d]) << 16);
    sum += x * x;
  }
  return sum;
}

// Adds to the logits of each pooled query what the spread of the keys behind the candidates gives.
inline void add_variance(const ScoreTask& t, const ScoreBuffers& b) {
  for (int j = 0; j < t.tiles * t.pooled_queries; ++j) {
    const float square = t.scale * t.scale * 1.44269504088896341f * square_norm(t.q[j], t.dtype, t.width);
    float* row = b.logits + j * b.columns;
    for (int64_t c = 0; c < t.candidates; ++c) row[c] += square * t.spread[c];
  }
}

// log2_sums[j] of every pooled query. Returns false if one is NaN.
template <class V, bool coarse>
inline bool sum_rows(const ScoreTask& t, const ScoreBuffers& b, float* log2_sums) {
  for (int j = 0; j < t.tiles * t.pooled_queries; ++j) {
    float* row = b.logits + j * b.columns;
    for (int64_t c = t.candidates; c < b.columns; ++c) row[c] = -__builtin_inff();
    log2_sums[j] = log2_sum<V, coarse>(row, b.columns);
    if (log2_sums[j] != log2_sums[j]) return false;
  }
  return true;
}

// Merges the logits of each tile's pooled queries and selects its keys. Returns false if a score is NaN.
// `weights` [columns] are added to the log2 probabilities, or null; so may be `log2_sums` if they do not matter.
// With `gaps` a weight of -inf marks a slot without a key: it comes after every key, also after those whose
// probability is too small for a float.
template <class V, class C>
inline bool select_keys(const ScoreTask& t, const ScoreBuffers& b, const float* weights, const float* log2_sums,
                        bool gaps = false) {
  using F = typename V::F;
  constexpr int L = V::lanes;
  for (int tile = 0; tile < t.tiles; ++tile) {
    const float* of_tile = b.logits + tile * t.pooled_queries * b.columns;
    const float* scores = of_tile;
    if (log2_sums) {
      // The largest probability has the largest logarithm, so only a sum needs the powers.
      const float* sums = log2_sums + tile * t.pooled_queries;
      for (int64_t c = 0; c < b.columns; c += L) {
        const F weight = weights ? V::load(weights + c) : V::set(0.0f);
        F best = V::add(V::sub(V::load(of_tile + c), V::set(sums[0])), weight);
        if (t.sum) best = V::template exp2<false>(best);
        for (int m = 1; m < t.pooled_queries; ++m) {
          const F next = V::add(V::sub(V::load(of_tile + m * b.columns + c), V::set(sums[m])), weight);
          best = t.sum ? V::add(best, V::template exp2<false>(next)) : V::max(next, best);
        }
        V::store(b.merged + c, best);
      }
      if (gaps) {
        constexpr float lowest = -3.402823466e38f;
        for (int64_t c = 0; c < t.candidates; ++c) {
          const float score = b.merged[c] < lowest ? lowest : b.merged[c];
          b.merged[c] = weights[c] == -__builtin_inff() ? -__builtin_inff() : score;
        }
      }
      scores = b.merged;
    }
    if (!select_topk<C>(scores, DType::float32, t.candidates, t.count, t.offset, t.indices + tile * t.out_stride,
                        b.topk))
      return false;
    if (t.scores)
      for (int64_t i = 0; i < t.count; ++i)
        t.scores[tile * t.count + i] = scores[t.indices[tile * t.out_stride + i] - t.offset];
  }
  return true;
}

// The candidates' weights, padded to full panels, or null if there are none.
inline const float* padded_weights(const ScoreTask& t, const ScoreBuffers& b) {
  if (!t.log2_weight) return nullptr;
  for (int64_t c = 0; c < b.columns; ++c) b.weights[c] = c < t.candidates ? t.log2_weight[c] : 0.0f;
  return b.weights;
}

// From logits to the selected keys. Returns false if a score is NaN.
template <class V, bool coarse, class C>
inline bool select_from_logits(const ScoreTask& t, const ScoreBuffers& b) {
  float log2_sums[kMaxScoreQueries];
  if (t.spread) add_variance(t, b);
  // One query without weights: the order of its logits is the answer, unless other tiles must compare with it.
  if (t.pooled_queries == 1 && !t.log2_weight && !t.scores) return select_keys<V, C>(t, b, nullptr, nullptr);
  return sum_rows<V, coarse>(t, b, log2_sums) && select_keys<V, C>(t, b, padded_weights(t, b), log2_sums);
}

// Pooled queries as the kernels multiply them; the last one again up to `padded`.
template <Mode mode>
inline void query_rows(const ScoreTask& t, int padded, const ScoreBuffers& b, const uint32_t** rows) {
  for (int j = 0; j < padded; ++j) {
    const int queries = t.tiles * t.pooled_queries, query = j < queries ? j : queries - 1;
    uint32_t* buffer = b.rows + static_cast<int64_t>(query) * t.width;
    if constexpr (mode == Mode::dot) {
      rows[j] = row_of_pairs(t.q[query], t.dtype, t.width, buffer);
    } else if constexpr (mode == Mode::convert) {
      widen(static_cast<const uint16_t*>(t.q[query]), buffer, t.width);
      rows[j] = buffer;
    } else {
      rows[j] = static_cast<const uint32_t*>(t.q[query]);
    }
  }
}

// With products of float32 (Mode::plain or Mode::convert). Returns false if a score is NaN.
template <class V, Mode mode, class C>
inline bool score_tiles(const ScoreTask& t, void* memory) {
  constexpr int NK = V::keys, block = kPanelKeys<V>;
  ScoreBuffers b;
  score_layout<V>(t, NK, static_cast<char*>(memory), &b);
  const int padded = (t.tiles * t.pooled_queries + NK - 1) / NK * NK;
  const uint32_t* rows[kMaxScoreQueries + NK];
  const float bias[NK] = {};
  query_rows<mode>(t, padded, b, rows);
  const uint32_t* packed = static_cast<const uint32_t*>(t.packed_keys);
  for (int64_t c = 0; c < b.columns; c += block, packed += t.width * block)
    for (int j = 0; j < padded; j += NK)
      logits_of_keys<V, mode, V::vectors>(packed, t.width, rows + j, t.scale * 1.44269504088896341f, bias,
                                          b.logits + j * b.columns + c, b.columns);
  return select_from_logits<V, false, C>(t, b);
}

}  // namespace
}  // namespace sparsifiner
