// Keys that one tile needs most among those of some blocks of kBlockKeys keys, as in scores.h.
//
// Each tile names other blocks, so the keys in the lanes are put together while they are multiplied: a packed block
// holds word after word of its kBlockKeys keys, and a vector is filled from as many blocks as fit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/scores.h"

namespace sparsifiner {
namespace {

template <Mode mode>
inline int block_words(DType, int width) {
  return mode == Mode::dot ? width / 2 : width;
}

inline void interleave(const uint32_t* __restrict a, const uint32_t* __restrict b, const uint32_t* __restrict c,
                       const uint32_t* __restrict d, int count, uint32_t* __restrict to) {
  static_assert(kBlockKeys == 4);
  for (int w = 0; w < count; ++w) {
    to[4 * w] = a[w];
    to[4 * w + 1] = b[w];
    to[4 * w + 2] = c[w];
    to[4 * w + 3] = d[w];
  }
}

// packed[words][kBlockKeys] from kBlockKeys rows, some of which may be null: zeros. Also the mean of those that are
// there, and its mean square distance from them per element.
template <Mode mode>
inline void pack_block(const void* const* rows, DType dtype, int width, void* packed, void* mean, float* spread) {
  float values[kBlockKeys][kMaxWidth], middle[kMaxWidth], square[kMaxWidth];
  bool there[kBlockKeys];
  float count = 0.0f, sum = 0.0f;
  for (int d = 0; d < width; ++d) middle[d] = square[d] = 0.0f;
  for (int i = 0; i < kBlockKeys; ++i) {
    there[i] = rows[i] != nullptr;
    if (there[i])
      widen_row(rows[i], dtype, width, values[i]);
    else
      for (int d = 0; d < width; ++d) values[i][d] = 0.0f;
    for (int d = 0; d < width; ++d) middle[d] += values[i][d];
    count += there[i] ? 1.0f : 0.0f;
  }
  const float factor = 1.0f / count;
  for (int d = 0; d < width; ++d) middle[d] *= factor;
  for (int i = 0; i < kBlockKeys; ++i)
    if (there[i])
      for (int d = 0; d < width; ++d) square[d] += (values[i][d] - middle[d]) * (values[i][d] - middle[d]);
  for (int d = 0; d < width; ++d) sum += square[d];
  *spread = sum * factor / static_cast<float>(width);
  if (dtype == DType::float32)
    __builtin_memcpy(mean, middle, static_cast<std::size_t>(width) * 4);
  else
    narrow(middle, static_cast<uint16_t*>(mean), width);

  uint32_t words[kBlockKeys][kMaxWidth];
  for (int i = 0; i < kBlockKeys; ++i) {
    if constexpr (mode == Mode::dot)
      narrow(values[i], reinterpret_cast<uint16_t*>(words[i]), width);
    else
      __builtin_memcpy(words[i], values[i], static_cast<std::size_t>(width) * 4);
  }
  interleave(words[0], words[1], words[2], words[3], block_words<mode>(dtype, width), static_cast<uint32_t*>(packed));
}

// logits[j][keys] = scale * q[j] . k for NQ queries and the keys of as many blocks as NV vectors hold, rows `stride`
// apart. `words` is a multiple of kBlockKeys: as many words at a time make whole cache lines.
template <class V, Mode mode, int NV, int NQ>
inline void logits_of_blocks(const uint32_t* const* blocks, int words, const uint32_t* const* q, float scale,
                             float* logits, int64_t stride) {
  using F = typename V::F;
  constexpr int L = V::lanes, each = L / kBlockKeys;
  F sum[NQ][NV];
#pragma GCC unroll 16
  for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[j][i] = V::set(0.0f);
  for (int w = 0; w < words; w += kBlockKeys) {
    F keys[NV][kBlockKeys];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) V::load_blocks(blocks + i * each, w * kBlockKeys, keys[i]);
#pragma GCC unroll 4
    for (int u = 0; u < kBlockKeys; ++u)
#pragma GCC unroll 16
      for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) sum[j][i] = multiply_add<V, mode>(keys[i][u], q[j][w + u], sum[j][i]);
  }
  const F factor = V::set(scale);
#pragma GCC unroll 16
  for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) V::store(logits + j * stride + i * L, V::mul(sum[j][i], factor));
}

constexpr int kBlockScoreQueries =
    4;  // pooled queries multiplied with a block at once: as many as a tile has by default

template <class V>
inline std::size_t score_blocks_scratch(const BlockScoreTask& task) {
  ScoreBuffers b;
  return score_layout<V>(task.score, kBlockScoreQueries, nullptr, &b);
}

// Returns false if a score is NaN.
template <class V, Mode mode, class C>
inline bool score_blocks(const BlockScoreTask& task, void* memory) {
  constexpr int NV = V::vectors, NQ = kBlockScoreQueries, blocks_per_panel = kPanelKeys<V> / kBlockKeys;
  const ScoreTask& t = task.score;
  ScoreBuffers b;
  score_layout<V>(t, NQ, static_cast<char*>(memory), &b);
  const int words = block_words<mode>(t.dtype, t.width);
  const int padded = (t.pooled_queries + NQ - 1) / NQ * NQ;
  const uint32_t* rows[kMaxScoreQueries + NQ];
  query_rows<mode>(t, padded, b, rows);
  const uint32_t* packed = static_cast<const uint32_t*>(t.packed_keys);
  const int64_t num_blocks = t.candidates / kBlockKeys;
  for (int64_t first = 0; first < b.columns / kBlockKeys; first += blocks_per_panel) {
    const uint32_t* blocks[blocks_per_panel];
    for (int i = 0; i < blocks_per_panel; ++i) {
      const int64_t slot = first + i < num_blocks ? first + i : num_blocks - 1;
      const int64_t block = task.blocks[slot];
      blocks[i] = packed + block * words * kBlockKeys;
      __builtin_memcpy(b.weights + (first + i) * kBlockKeys, task.log2_weight + block * kBlockKeys, kBlockKeys * 4);
    }
    for (int j = 0; j < padded; j += NQ)
      logits_of_blocks<V, mode, NV, NQ>(blocks, words, rows + j, t.scale * 1.44269504088896341f,
                                        b.logits + j * b.columns + first * kBlockKeys, b.columns);
  }
  bool gaps = false;  // slots without a key
  for (int64_t c = 0; c < t.candidates; ++c) {
    if (b.weights[c] != -__builtin_inff()) continue;
    gaps = true;
    for (int j = 0; j < t.pooled_queries; ++j) b.logits[j * b.columns + c] = -__builtin_inff();
  }
  float log2_sums[kMaxScoreQueries];
  return sum_rows<V, mode == Mode::dot>(t, b, log2_sums) && select_keys<V, C>(t, b, b.weights, log2_sums, gaps);
}

}  // namespace
}  // namespace sparsifiner
