// Scores from products of bytes, four at a time where bfloat16 has two: only their order counts.
//
// Each key and each pooled query is rounded to integers of -127 to 127 times a factor of its own. The instruction wants
// one side unsigned, so 128 is added to the queries, and each key's sum, times 128, is where its products start from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/int8_rows.h"
#include "kernels/scores.h"

namespace sparsifiner {
namespace {

// The row as float32: itself, or widened into `buffer`.
inline const float* row_of_floats(const void* row, DType dtype, int width, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(row);
  widen_row(row, dtype, width, buffer);
  return buffer;
}

// Words of four bytes, and two more: the factor of the key, and the integer its products start from.
inline int int8_key_words(DType, int width) { return width / 4 + 2; }

// keys[width / 4 + 2][panel_keys] from `count` rows.
template <class V>
inline void pack_keys_as_int8(const void* const* rows, DType dtype, int count, int width, void* packed) {
  constexpr int block = kPanelKeys<V>;
  uint32_t* words = static_cast<uint32_t*>(packed);
  uint32_t* scales = words + width / 4 * block;
  uint32_t* starts = scales + block;
  uint32_t bytes[block][32];
  const void* rounded[block];
  for (int i = 0; i < block; ++i) {
    if (i >= count) {
      scales[i] = starts[i] = 0;
      continue;
    }
    float buffer[kMaxWidth];
    const float* row = row_of_floats(rows[i], dtype, width, buffer);
    const Int8Factors factors = int8_factors(row, width);
    const int32_t sum = V::round_to_int8(row, factors.rounding, width, reinterpret_cast<int8_t*>(bytes[i]));
    rounded[i] = bytes[i];
    scales[i] = to_bits(factors.scale);
    starts[i] = static_cast<uint32_t>(-128 * sum);
  }
  // Words of four bytes are moved like words of two bfloat16, of which a row of half the width has as many.
  pack_keys_as<V, Mode::dot>(rounded, count, width / 2, packed);
}

// logits[j][keys] = factors[j] * scale[key] * (q[j] . key) for V::keys queries and a packed block of keys, rows
// `stride` apart.
template <class V>
inline void logits_of_int8(const uint32_t* packed, int words, const uint32_t* const* q, const float* factors,
                           float* logits, int64_t stride) {
  constexpr int NQ = V::keys, NV = V::vectors, L = V::lanes;
  const int32_t* keys = reinterpret_cast<const int32_t*>(packed);
  const float* scales = reinterpret_cast<const float*>(packed + words * NV * L);
  const int32_t* starts = keys + (words + 1) * NV * L;
  typename V::I sum[NQ][NV];
#pragma GCC unroll 16
  for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[j][i] = V::load_integers(starts + i * L);
  for (int w = 0; w < words; ++w) {
    typename V::I lanes[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) lanes[i] = V::load_integers(keys + (w * NV + i) * L);
#pragma GCC unroll 16
    for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sum[j][i] = V::dot_int8(q[j][w], lanes[i], sum[j][i]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < NQ; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const auto scaled = V::mul(V::to_float(sum[j][i]), V::load(scales + i * L));
      V::store(logits + j * stride + i * L, V::mul(scaled, V::set(factors[j])));
    }
}

// Returns false if a score is NaN.
template <class V, class C>
inline bool score_in_int8(const ScoreTask& t, void* memory) {
  constexpr int NQ = V::keys, block = kPanelKeys<V>;
  ScoreBuffers b;
  score_layout<V>(t, NQ, static_cast<char*>(memory), &b);
  const int words = t.width / 4, queries = t.tiles * t.pooled_queries, padded = (queries + NQ - 1) / NQ * NQ;
  const uint32_t* rows[kMaxScoreQueries + NQ];
  float factors[kMaxScoreQueries + NQ];
  for (int j = 0; j < queries; ++j) {
    float buffer[kMaxWidth];
    const float* row = row_of_floats(t.q[j], t.dtype, t.width, buffer);
    const Int8Factors of_row = int8_factors(row, t.width);
    uint32_t* bytes = b.rows + static_cast<int64_t>(j) * words;
    V::round_to_int8(row, of_row.rounding, t.width, reinterpret_cast<int8_t*>(bytes));
    for (int w = 0; w < words; ++w) bytes[w] ^= 0x80808080u;  // adds 128 to each byte
    rows[j] = bytes;
    factors[j] = of_row.scale * t.scale * 1.44269504088896341f;
  }
  for (int j = queries; j < padded; ++j) {  // the last one again
    rows[j] = rows[queries - 1];
    factors[j] = factors[queries - 1];
  }
  const uint32_t* packed = static_cast<const uint32_t*>(t.packed_keys);
  for (int64_t c = 0; c < b.columns; c += block, packed += int8_key_words(t.dtype, t.width) * block)
    for (int j = 0; j < padded; j += NQ)
      logits_of_int8<V>(packed, words, rows + j, factors + j, b.logits + j * b.columns + c, b.columns);
  return select_from_logits<V, true, C>(t, b);
}

}  // namespace
}  // namespace sparsifiner
