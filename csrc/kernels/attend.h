// Attention of one tile, written once for every instruction set.
//
// Queries lie in the lanes of the vectors: every product multiplies a vector of queries by one element
// of a key (or a vector of softmax weights by one element of a value), broadcast straight from where the
// model left it. So kept keys are not transposed, maxima and sums need no horizontal steps, and only the
// queries and the result are transposed, once per tile.
//
// The kept keys pass in chunks that stay in the first-level cache, with an online softmax in base 2. The caller
// has copied their rows together (drivers/attend.cpp), so that they do not evict each other there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bump_allocator.h"
#include "core/kernel_table.h"
#include "kernels/convert.h"
#include "kernels/int8_rows.h"

namespace sparsifiner {
namespace {

constexpr int kChunk = 64;

enum class Mode {
  plain,    // float32 throughout
  convert,  // bfloat16 rows, widened to float32 chunk by chunk
  dot,      // pairs of bfloat16 multiplied and added in float32 (V::dot)
  int8,     // queries and keys as bytes (V::dot_int8), values and weights in float32
};

// Scratch of one group of NV vectors of queries. A word is a float32 or a pair of bfloat16.
struct Buffers {
  uint32_t* q;        // [words of D][lanes]
  float* logits;      // [kChunk + padding][lanes]
  uint32_t* weights;  // [kChunk / 2][lanes], Mode::dot only
  float* out;         // [D][lanes]
  uint32_t* k;        // [kChunk][D], Mode::convert only
  uint32_t* v;        // [kChunk][D], Mode::convert, or [kChunk / 2][D] pairs, Mode::dot
  float* row;         // [D]
  float* max;         // [lanes]
  float* sum;         // [lanes]
  float* scales;      // [lanes], Mode::int8 only: of the queries
  int32_t* starts;    // [lanes], Mode::int8 only: what the products of a query start from
};

constexpr int kMaxLanes = 64;
constexpr int kPadding = 16;

// Lays out scratch for chunks of `chunk` keys; returns the bytes it takes.
inline std::size_t layout(int width, int chunk, char* base, Buffers* b) {
  BumpAllocator allocator{base};
  const std::size_t lanes = kMaxLanes, w = static_cast<std::size_t>(width), c = static_cast<std::size_t>(chunk);
  b->q = allocator.allocate<uint32_t>(w * lanes);
  b->logits = allocator.allocate<float>((c + kPadding) * lanes);
  b->weights = allocator.allocate<uint32_t>(c / 2 * lanes);
  b->out = allocator.allocate<float>(w * lanes);
  b->k = allocator.allocate<uint32_t>(c * w);
  b->v = allocator.allocate<uint32_t>(c * w);
  b->row = allocator.allocate<float>(w);
  b->max = allocator.allocate<float>(lanes);
  b->sum = allocator.allocate<float>(lanes);
  b->scales = allocator.allocate<float>(lanes);
  b->starts = allocator.allocate<int32_t>(lanes);
  return allocator.used;
}

template <class V, Mode mode>
inline typename V::F multiply_add(typename V::F lanes, uint32_t word, typename V::F sum) {
  if constexpr (mode == Mode::dot)
    return V::dot(lanes, word, sum);
  else
    return V::fma(lanes, V::set(from_bits(word)), sum);
}

// logits[j][lanes] = scale * q . k[j] + bias[j] for V::keys keys, rows `stride` apart.
template <class V, Mode mode, int NV>
inline void logits_of_keys(const uint32_t* q, int words, const uint32_t* const* k, float scale, const float* bias,
                           float* logits, int64_t stride = NV * V::lanes) {
  using F = typename V::F;
  constexpr int NK = V::keys, L = V::lanes;
  F sum[NK][NV];
#pragma GCC unroll 16
  for (int j = 0; j < NK; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[j][i] = V::set(0.0f);
  const uint32_t* row[NK];
#pragma GCC unroll 16
  for (int j = 0; j < NK; ++j) row[j] = k[j];
  for (int w = 0; w < words; ++w) {
    F query[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) query[i] = V::load(reinterpret_cast<const float*>(q) + (w * NV + i) * L);
#pragma GCC unroll 16
    for (int j = 0; j < NK; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sum[j][i] = multiply_add<V, mode>(query[i], row[j][w], sum[j][i]);
  }
  const F factor = V::set(scale);
#pragma GCC unroll 16
  for (int j = 0; j < NK; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) V::store(logits + j * stride + i * L, V::fma(sum[j][i], factor, V::set(bias[j])));
}

// out[d][lanes] += weights[m][lanes] * v[m][d] for V::dims(NV) values of d from `first`.
template <class V, Mode mode, int NV>
inline void add_values(const uint32_t* weights, const uint32_t* const* v, int count, int first, float* out) {
  using F = typename V::F;
  constexpr int ND = V::dims(NV), L = V::lanes;
  F sum[ND][NV];
#pragma GCC unroll 16
  for (int d = 0; d < ND; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[d][i] = V::load(out + ((first + d) * NV + i) * L);
  for (int m = 0; m < count; ++m) {
    const uint32_t* row = v[m] + first;
    asm("" : "+r"(row));  // one register and constant offsets; GCC would keep an address for every d
    F weight[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) weight[i] = V::load(reinterpret_cast<const float*>(weights) + (m * NV + i) * L);
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sum[d][i] = multiply_add<V, mode>(weight[i], row[d], sum[d][i]);
  }
#pragma GCC unroll 16
  for (int d = 0; d < ND; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) V::store(out + ((first + d) * NV + i) * L, sum[d][i]);
}

// Turns logits into weights relative to the running maximum. Where that rises, `rescale` is given the factors,
// [lanes], for what was summed before.
template <class V, Mode mode, int NV, class Rescale>
inline void online_softmax(const Buffers& b, int count, Rescale rescale) {
  using F = typename V::F;
  constexpr int L = V::lanes;
  F before[NV], max[NV], sum[NV];
  for (int i = 0; i < NV; ++i) {
    before[i] = max[i] = V::load(b.max + i * L);
    sum[i] = V::load(b.sum + i * L);
  }
  for (int m = 0; m < count; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) max[i] = V::max(V::load(b.logits + (m * NV + i) * L), max[i]);
  bool max_changed = false;
  for (int i = 0; i < NV; ++i) max_changed |= V::any_greater(max[i], before[i]);
  if (max_changed) {
    float factors[NV * L];
    for (int i = 0; i < NV; ++i) {
      const F factor = V::template exp2<false>(V::sub(before[i], max[i]));
      sum[i] = V::mul(sum[i], factor);
      V::store(factors + i * L, factor);
      V::store(b.max + i * L, max[i]);
    }
    rescale(factors);
  }
  if constexpr (mode == Mode::dot) {
    for (int m = 0; m < count; m += 2)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const F even = V::template exp2<true>(V::sub(V::load(b.logits + (m * NV + i) * L), max[i]));
        F odd = V::set(0.0f);
        if (m + 1 < count) odd = V::template exp2<true>(V::sub(V::load(b.logits + ((m + 1) * NV + i) * L), max[i]));
        sum[i] = V::add(sum[i], V::add(even, odd));
        V::store_pairs(b.weights + (m / 2 * NV + i) * L, even, odd);
      }
  } else {
    for (int m = 0; m < count; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        float* at = b.logits + (m * NV + i) * L;
        const F weight = V::template exp2<false>(V::sub(V::load(at), max[i]));
        sum[i] = V::add(sum[i], weight);
        V::store(at, weight);
      }
  }
  for (int i = 0; i < NV; ++i) V::store(b.sum + i * L, sum[i]);
}

// to[w][lane] = rows[lane][w] for V::lanes rows of `words` words; rows of the result lie `stride` words apart.
template <class V>
inline void transpose_rows(const uint32_t* const* rows, int words, uint32_t* to, int stride) {
  constexpr int L = V::lanes;
  int w = 0;
  for (; w + L <= words; w += L) V::transpose(rows, w, to + w * stride, stride);
  for (; w < words; ++w)
    for (int lane = 0; lane < L; ++lane) __builtin_memcpy(to + w * stride + lane, rows[lane] + w, 4);
}

// to[words of D][NV * V::lanes]: queries in lanes; lanes without a query hold zeros.
template <class V, Mode mode, int NV>
inline void transpose_queries(const TileTask& t, int first, int count, uint32_t* to) {
  constexpr int L = V::lanes, lanes = NV * L;
  const int words = mode == Mode::dot ? t.width / 2 : t.width;
  static const uint32_t zeros[kMaxWidth] = {};
  uint32_t wide[mode == Mode::convert ? L * kMaxWidth : 1];
  for (int lane = 0; lane < lanes; lane += L) {
    const uint32_t* rows[L];
    for (int i = 0; i < L; ++i) {
      rows[i] = zeros;
      if (lane + i >= count) continue;
      const void* query = t.q[first + lane + i];
      if constexpr (mode == Mode::convert) {
        widen(static_cast<const uint16_t*>(query), wide + i * t.width, t.width);
        rows[i] = wide + i * t.width;
      } else {
        rows[i] = static_cast<const uint32_t*>(query);
      }
    }
    transpose_rows<V>(rows, words, to + lane, lanes);
  }
}

// One row of the result: divided by the sum of its weights and rounded.
inline void store_query(const TileTask& t, int query, const float* row, float sum, float* scaled) {
  // Nothing was summed where every key was masked.
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (t.out_dtype == DType::float32) {
    float* to = static_cast<float*>(t.out[query]);
    for (int d = 0; d < t.width; ++d) to[d] = row[d] * factor;
  } else {
    for (int d = 0; d < t.width; ++d) scaled[d] = row[d] * factor;
    narrow(scaled, static_cast<uint16_t*>(t.out[query]), t.width);
  }
}

template <class V, int NV>
inline void store_result(const TileTask& t, int first, int count, const Buffers& b) {
  constexpr int L = V::lanes, lanes = NV * L;
  for (int lane = 0; lane < count; ++lane) {
    // The logits are no longer needed; their memory takes the result, one row per query.
    if (lane % L == 0)
      for (int d = 0; d < t.width; d += L) {
        const uint32_t* rows[L];
        for (int i = 0; i < L; ++i) rows[i] = reinterpret_cast<const uint32_t*>(b.out + (d + i) * lanes + lane);
        V::transpose(rows, 0, reinterpret_cast<uint32_t*>(b.logits) + d, t.width);
      }
    store_query(t, first + lane, b.logits + lane % L * t.width, b.sum[lane], b.row);
  }
}

template <int lanes>
inline void init_sums(int width, const Buffers& b) {
  for (int i = 0; i < width * lanes; ++i) b.out[i] = 0.0f;
  for (int i = 0; i < lanes; ++i) {
    b.max[i] = -3.402823466e38f;
    b.sum[i] = 0.0f;
  }
}

// to[D / 4][lanes]: queries in lanes as integers of -127 to 127 times b.scales.
template <class V, int NV>
inline void transpose_int8_queries(const TileTask& t, int first, int count, const Buffers& b) {
  constexpr int L = V::lanes, lanes = NV * L;
  uint32_t bytes[L][kMaxWidth / 4];
  for (int lane = 0; lane < lanes; lane += L) {
    const uint32_t* rows[L];
    for (int i = 0; i < L; ++i) {
      rows[i] = bytes[i];
      // Lanes without a query repeat the first one.
      const float* query = static_cast<const float*>(t.q[first + (lane + i < count ? lane + i : 0)]);
      const Int8Factors factors = int8_factors(query, t.width);
      const int32_t sum = V::round_to_int8(query, factors.rounding, t.width, reinterpret_cast<int8_t*>(bytes[i]));
      b.scales[lane + i] = factors.scale;
      b.starts[lane + i] = -128 * sum;
    }
    transpose_rows<V>(rows, t.width / 4, b.q + lane, lanes);
  }
}

// logits[j][lanes] = factors[j] * scales * (q . k[j]) + bias[j] for V::keys keys of unsigned bytes, rows `stride`
// apart.
template <class V, int NV>
inline void logits_of_int8_keys(const Buffers& b, int words, const uint32_t* const* k, const float* factors,
                                const float* bias, float* logits) {
  constexpr int NK = V::keys, L = V::lanes;
  typename V::I sum[NK][NV];
  const uint32_t* row[NK];
#pragma GCC unroll 16
  for (int j = 0; j < NK; ++j) {
    row[j] = k[j];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[j][i] = V::load_integers(b.starts + i * L);
  }
  for (int w = 0; w < words; ++w) {
    typename V::I query[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) query[i] = V::load_integers(reinterpret_cast<const int32_t*>(b.q) + (w * NV + i) * L);
#pragma GCC unroll 16
    for (int j = 0; j < NK; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sum[j][i] = V::dot_int8(row[j][w], query[i], sum[j][i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) {
    const typename V::F scale = V::load(b.scales + i * L);
#pragma GCC unroll 16
    for (int j = 0; j < NK; ++j) {
      const typename V::F scaled = V::mul(V::to_float(sum[j][i]), scale);
      V::store(logits + (j * NV + i) * L, V::fma(scaled, V::set(factors[j]), V::set(bias[j])));
    }
  }
}

// Attention of `count` queries from `first`, at most NV vectors of them.
template <class V, Mode mode, int NV>
inline void attend_group(const TileTask& t, int first, int count, const Buffers& b) {
  constexpr int L = V::lanes, NK = V::keys;
  constexpr float log2e = 1.44269504088896341f;
  const int words = mode == Mode::dot ? t.width / 2 : t.width;
  if constexpr (mode == Mode::int8)
    transpose_int8_queries<V, NV>(t, first, count, b);
  else
    transpose_queries<V, mode, NV>(t, first, count, b.q);
  init_sums<NV * L>(t.width, b);
  const uint32_t* k[kChunk + kPadding];
  const uint32_t* v[kChunk];
  float bias[kChunk + kPadding], factors[mode == Mode::int8 ? kChunk + kPadding : 1];
  for (int start = 0; start < t.keys; start += kChunk) {
    const int size = t.keys - start < kChunk ? t.keys - start : kChunk;
    const int padded = (size + NK - 1) / NK * NK;
    for (int j = 0; j < padded; ++j) {
      const int key = start + (j < size ? j : size - 1);
      k[j] = static_cast<const uint32_t*>(t.k[key]);
      bias[j] = t.bias != nullptr ? t.bias[key] * log2e : 0.0f;
      if constexpr (mode == Mode::int8) factors[j] = t.key_scales[key] * t.scale * log2e;
    }
    const int next = t.keys - start - size < kChunk ? t.keys - start - size : kChunk;
    const int value_bytes = t.width * (t.dtype == DType::float32 ? 4 : 2);
    const int key_bytes = mode == Mode::int8 ? t.width : value_bytes;
    for (int j = 0; j < next; ++j) {
      for (int byte = 0; byte < key_bytes; byte += 64)
        __builtin_prefetch(static_cast<const char*>(t.k[start + size + j]) + byte, 0, 2);
      for (int byte = 0; byte < value_bytes; byte += 64)
        __builtin_prefetch(static_cast<const char*>(t.v[start + size + j]) + byte, 0, 2);
    }
    if constexpr (mode == Mode::convert) {
      for (int j = 0; j < size; ++j) widen(static_cast<const uint16_t*>(t.k[start + j]), b.k + j * t.width, t.width);
      for (int j = 0; j < padded; ++j) k[j] = b.k + (j < size ? j : size - 1) * t.width;
    }
    for (int j = 0; j < padded; j += NK) {
      if constexpr (mode == Mode::int8)
        logits_of_int8_keys<V, NV>(b, t.width / 4, k + j, factors + j, bias + j, b.logits + j * NV * L);
      else
        logits_of_keys<V, mode, NV>(b.q, words, k + j, t.scale * log2e, bias + j, b.logits + j * NV * L);
    }
    online_softmax<V, mode, NV>(b, size, [&](const float* factors) {
      for (int i = 0; i < NV; ++i) {
        const typename V::F factor = V::load(factors + i * L);
        for (int d = 0; d < t.width; ++d) {
          float* at = b.out + (d * NV + i) * L;
          V::store(at, V::mul(V::load(at), factor));
        }
      }
    });
    int rows = size;
    if constexpr (mode == Mode::plain || mode == Mode::int8) {
      for (int j = 0; j < size; ++j) v[j] = static_cast<const uint32_t*>(t.v[start + j]);
    } else if constexpr (mode == Mode::convert) {
      for (int j = 0; j < size; ++j) {
        widen(static_cast<const uint16_t*>(t.v[start + j]), b.v + j * t.width, t.width);
        v[j] = b.v + j * t.width;
      }
    } else {
      rows = (size + 1) / 2;
      for (int j = 0; j < rows; ++j) {
        v[j] = b.v + j * t.width;
        V::pair_rows(t.v[start + 2 * j], 2 * j + 1 < size ? t.v[start + 2 * j + 1] : nullptr, b.v + j * t.width,
                     t.width);
      }
    }
    const uint32_t* weights = mode == Mode::dot ? b.weights : reinterpret_cast<const uint32_t*>(b.logits);
    for (int d = 0; d < t.width; d += V::dims(NV)) add_values<V, mode, NV>(weights, v, rows, d, b.out);
  }
  store_result<V, NV>(t, first, count, b);
}

template <class V, Mode mode>
inline void attend_tile(const TileTask& t, void* memory) {
  constexpr int L = V::lanes, NV = V::vectors;
  static_assert(NV * L <= kMaxLanes);
  Buffers b;
  layout(t.width, kChunk, static_cast<char*>(memory), &b);
  for (int first = 0; first < t.queries; first += NV * L) {
    const int left = t.queries - first;
    if (left <= L)
      attend_group<V, mode, 1>(t, first, left, b);
    else
      attend_group<V, mode, NV>(t, first, left < NV * L ? left : NV * L, b);
  }
}

inline std::size_t attend_scratch(const TileTask& t) {
  Buffers b;
  return layout(t.width, kChunk, nullptr, &b);
}

}  // namespace
}  // namespace sparsifiner
