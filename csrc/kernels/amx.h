// Attention and scores in tiles: 16 x 16 float32 sums of products of bfloat16 pairs.
//
// `Tiles` is the tile unit: eight registers of 16 rows of 16 words (a word is a float32 or a pair of
// bfloat16), configured for one work item at a time, because the configuration belongs to the thread and
// other libraries (oneDNN) set their own there between our items. It offers
//   configure(), release(), zero<t>(), load<t>(words, stride), store<t>(words, stride),
//   multiply<c, a, b>(): c[m][n] += sum over k of the pair products a[m][k] * b[k][n].
// The right factor thus holds, in row k, the elements 2k and 2k + 1 of each of its 16 columns.
//
// Queries lie in the lanes, as in attend.h, so its softmax serves here too:
//   logits[keys][lanes] = rows of kept keys, copied together, times the transposed queries;
//   out[queries][D]    += the weights, transposed, times pairs of value rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attend.h"
#include "kernels/scores.h"

namespace sparsifiner {
namespace {

constexpr int kTileChunk = 256;  // keys between two rescalings, a multiple of 64
constexpr int kTileSide = 16;

template <class Tiles>
struct TileScope {
  TileScope() { Tiles::configure(); }
  ~TileScope() { Tiles::release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

constexpr int round_to_tile(int n) { return (n + kTileSide - 1) / kTileSide * kTileSide; }

// Words of a row of `width` bfloat16, padded to whole tiles.
constexpr int tile_words(int width) { return round_to_tile(width / 2); }

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls body(Constant<i>) for i in [0, count): register numbers are part of the instructions.
template <int count, int i = 0, class Body>
inline void unroll(Body&& body) {
  if constexpr (i < count) {
    body(Constant<i>{});
    unroll<count, i + 1>(body);
  }
}

// c = a b, or c += a b: M x N tiles of c, `steps` tiles along the common side. Strides count words.
// Four sums are in flight where M * N = 4, enough to hide the latency of a product behind the others.
template <class Tiles, int M, int N, bool add>
inline void multiply_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int steps,
                           float* c, int64_t c_stride) {
  static_assert(M * N <= 4 && (N <= 2 || M == 1), "registers: 4 for c, 2 each for a and b");
  unroll<M * N>([&](auto t) {
    constexpr int tile = decltype(t)::value;
    if constexpr (add)
      Tiles::template load<tile>(c + tile / N * kTileSide * c_stride + tile % N * kTileSide, c_stride);
    else
      Tiles::template zero<tile>();
  });
  for (int step = 0; step < steps; ++step) {
    const uint32_t* left = a + step * kTileSide;
    const uint32_t* right = b + step * kTileSide * b_stride;
    unroll<M>([&](auto row) {
      constexpr int m = decltype(row)::value;
      Tiles::template load<4 + m % 2>(left + m * kTileSide * a_stride, a_stride);
      unroll<N>([&](auto column) {
        constexpr int n = decltype(column)::value;
        if constexpr (m == 0) Tiles::template load<6 + n % 2>(right + n * kTileSide, b_stride);
        Tiles::template multiply<m * N + n, 4 + m % 2, 6 + n % 2>();
      });
    });
  }
  unroll<M * N>([&](auto t) {
    constexpr int tile = decltype(t)::value;
    Tiles::template store<tile>(c + tile / N * kTileSide * c_stride + tile % N * kTileSide, c_stride);
  });
}

// Copies a row of bfloat16 and pads it with zeros to whole tiles.
inline void copy_padded(const void* from, int width, uint32_t* to) {
  const uint32_t* words = static_cast<const uint32_t*>(from);
  int w = 0;
  for (; w + kTileSide <= width / 2; w += kTileSide) __builtin_memcpy(to + w, words + w, 4 * kTileSide);
  if (w == width / 2) return;
  for (; w < width / 2; ++w) to[w] = words[w];
  for (; w < tile_words(width); ++w) to[w] = 0;
}

// Into the second-level cache.
inline void prefetch_row(const void* row, int width) {
  for (int byte = 0; byte < 2 * width; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte, 0, 2);
}

// Attention of `count` queries from `first`, at most NV * 16 of them.
template <class V, class Tiles, int NV>
inline void attend_group_in_tiles(const TileTask& t, int first, int count, const Buffers& b) {
  static_assert(V::lanes == kTileSide);
  using F = typename V::F;
  constexpr int L = V::lanes, lanes = NV * L;
  constexpr int M = 4 / NV;  // tiles of keys multiplied at once
  const int words = t.width / 2, padded_words = tile_words(t.width);
  transpose_queries<V, Mode::dot, NV>(t, first, count, b.q);
  for (int i = words * lanes; i < padded_words * lanes; ++i) b.q[i] = 0;
  init_sums<lanes>(t.width, b);
  const F factor = V::set(t.scale * 1.44269504088896341f);
  for (int start = 0; start < t.keys; start += kTileChunk) {
    const int size = t.keys - start < kTileChunk ? t.keys - start : kTileChunk;
    for (int j = 0; j < size; ++j) copy_padded(t.k[start + j], t.width, b.k + j * padded_words);
    // Rows beyond `size` hold anything: each row of keys makes one row of logits, and those are not read.
    for (int j = 0; j < size; j += M * kTileSide)
      multiply_tiles<Tiles, M, NV, false>(b.k + j * padded_words, padded_words, b.q, lanes, padded_words / kTileSide,
                                          b.logits + j * lanes, lanes);
    for (int j = 0; j < size; ++j) {
      prefetch_row(t.v[start + j], t.width);
      const F bias = V::set(t.bias != nullptr ? t.bias[start + j] * 1.44269504088896341f : 0.0f);
      for (int i = 0; i < NV; ++i) {
        float* at = b.logits + j * lanes + i * L;
        V::store(at, V::fma(V::load(at), factor, bias));
      }
    }
    online_softmax<V, Mode::dot, NV>(b, size, [&](const float* factors) {
      for (int lane = 0; lane < lanes; ++lane)
        for (int d = 0; d < t.width; d += L) {
          float* at = b.out + lane * t.width + d;
          V::store(at, V::mul(V::load(at), V::set(factors[lane])));
        }
    });
    // Here both factors run along the padded side, so both must be zero there: 0 * NaN would not vanish.
    const int pairs = (size + 1) / 2, padded_pairs = round_to_tile(pairs);
    for (int i = pairs * lanes; i < padded_pairs * lanes; ++i) b.weights[i] = 0;
    for (int i = pairs * t.width; i < padded_pairs * t.width; ++i) b.v[i] = 0;
    for (int j = 0; j < size; j += 2) {
      for (int next = start + kTileChunk + j; next < start + kTileChunk + j + 2 && next < t.keys; ++next)
        prefetch_row(t.k[next], t.width);
      V::pair_rows(t.v[start + j], j + 1 < size ? t.v[start + j + 1] : nullptr, b.v + j / 2 * t.width, t.width);
    }
    // The logits are no longer needed; their memory takes the transposed weights, [lanes][kTileChunk / 2].
    uint32_t* left = reinterpret_cast<uint32_t*>(b.logits);
    for (int m = 0; m < padded_pairs; m += kTileSide)
      for (int i = 0; i < NV; ++i) {
        const uint32_t* rows[kTileSide];
        for (int pair = 0; pair < kTileSide; ++pair) rows[pair] = b.weights + (m + pair) * lanes + i * L;
        V::transpose(rows, 0, left + i * L * (kTileChunk / 2) + m, kTileChunk / 2);
      }
    for (int i = 0; i < NV; ++i)
      for (int d = 0; d < t.width; d += 4 * kTileSide) {
        const auto add = [&](auto tiles) {
          multiply_tiles<Tiles, 1, decltype(tiles)::value, true>(left + i * L * (kTileChunk / 2), kTileChunk / 2,
                                                                 b.v + d, t.width, padded_pairs / kTileSide,
                                                                 b.out + i * L * t.width + d, t.width);
        };
        const int tiles = (t.width - d) / kTileSide;
        if (tiles >= 4)
          add(Constant<4>{});
        else if (tiles == 3)
          add(Constant<3>{});
        else if (tiles == 2)
          add(Constant<2>{});
        else
          add(Constant<1>{});
      }
  }
  for (int lane = 0; lane < count; ++lane) store_query(t, first + lane, b.out + lane * t.width, b.sum[lane], b.row);
}

template <class V, class Tiles>
inline void attend_in_tiles(const TileTask& t, void* memory) {
  constexpr int L = V::lanes;
  Buffers b;
  layout(t.width, kTileChunk, static_cast<char*>(memory), &b);
  const TileScope<Tiles> scope;
  for (int first = 0; first < t.queries; first += 2 * L) {
    const int left = t.queries - first;
    if (left <= L)
      attend_group_in_tiles<V, Tiles, 1>(t, first, left, b);
    else
      attend_group_in_tiles<V, Tiles, 2>(t, first, left < 2 * L ? left : 2 * L, b);
  }
}

inline std::size_t attend_scratch_in_tiles(const TileTask& t) {
  Buffers b;
  return layout(t.width, kTileChunk, nullptr, &b);
}

// keys[width / 2][panel_keys] of pairs of bfloat16 from `count` rows of either type.
template <class V>
inline void pack_key_pairs(const void* const* rows, DType dtype, int count, int width, void* packed) {
  uint32_t rounded[kPanelKeys<V>][64];
  const void* pairs[kPanelKeys<V>];
  for (int i = 0; i < count; ++i) pairs[i] = row_of_pairs(rows[i], dtype, width, rounded[i]);
  pack_keys_as<V, Mode::dot>(pairs, count, width, packed);
}

// keys[tile_words(width)][panel_keys]: whole tiles of the right factor; words beyond the width hold zeros.
template <class V>
inline void pack_keys_in_tiles(const void* const* rows, DType dtype, int count, int width, void* packed) {
  constexpr int block = kPanelKeys<V>;
  pack_key_pairs<V>(rows, dtype, count, width, packed);
  uint32_t* words = static_cast<uint32_t*>(packed);
  for (int i = width / 2 * block; i < tile_words(width) * block; ++i) words[i] = 0;
}

template <class V>
inline std::size_t score_scratch_in_tiles(const ScoreTask& t) {
  ScoreBuffers b;
  return score_layout<V>(t, kTileSide, nullptr, &b);
}

// Returns false if a score is NaN.
template <class V, class Tiles, class C>
inline bool score_in_tiles(const ScoreTask& t, void* memory) {
  constexpr int block = kPanelKeys<V>, N = block / kTileSide;
  static_assert(N == 2);
  ScoreBuffers b;
  score_layout<V>(t, kTileSide, static_cast<char*>(memory), &b);
  const int queries = t.tiles * t.pooled_queries, padded = round_to_tile(queries), words = tile_words(t.width);
  uint32_t rounded[64];
  for (int j = 0; j < padded; ++j)
    copy_padded(row_of_pairs(t.q[j < queries ? j : queries - 1], t.dtype, t.width, rounded), t.width,
                b.rows + j * words);
  const uint32_t* packed = static_cast<const uint32_t*>(t.packed_keys);
  {
    const TileScope<Tiles> scope;
    for (int64_t c = 0; c < b.columns; c += block, packed += words * block)
      for (int j = 0; j < padded; j += 2 * kTileSide) {
        const uint32_t* rows = b.rows + j * words;
        float* logits = b.logits + j * b.columns + c;
        if (j + kTileSide < padded)
          multiply_tiles<Tiles, 2, N, false>(rows, words, packed, block, words / kTileSide, logits, b.columns);
        else
          multiply_tiles<Tiles, 1, N, false>(rows, words, packed, block, words / kTileSide, logits, b.columns);
      }
  }
  const auto factor = V::set(t.scale * 1.44269504088896341f);
  for (int64_t i = 0; i < queries * b.columns; i += V::lanes)
    V::store(b.logits + i, V::mul(V::load(b.logits + i), factor));
  return select_from_logits<V, true, C>(t, b);
}

}  // namespace
}  // namespace sparsifiner
