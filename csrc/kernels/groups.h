// Representative queries of one tile, the nearest mean of some rows, and how far rows lie from one.
// Plain loops are vectorised by the compiler with the flags of the including file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bump_allocator.h"
#include "core/kernel_table.h"
#include "kernels/attend.h"
#include "kernels/topk.h"

namespace sparsifiner {
namespace {

// A number of rows, padded to full vectors.
template <class V>
inline int round_up_to_lanes(int count) {
  return (count + V::lanes - 1) / V::lanes * V::lanes;
}

// What it takes to find the nearest of G centroids for S rows.
struct NearestBuffers {
  const float** rows;       // [padded S], each [D]; those beyond S repeat the first
  float* wide;              // [S][D], rows that were not float32
  float* lanes;             // [D][padded S]
  const float** centroids;  // [padded G], each [D]
  float* half_squares;      // [padded G]: |centroid|^2 / 2
  float* nearness;          // [padded G][padded S]
  float* top;               // [padded S]
  int32_t* assignment;      // [padded S]
};

struct GroupBuffers {
  NearestBuffers nearest;
  float* centroid;  // [G][D]
  float* sum;       // [G][D]
  int32_t* count;   // [G]
};

// Centroids that are measured together, so that the products of one need not wait for each other: the 2x2 groups of a
// tile's queries, or a block and those around it.
inline int centroid_batch(int count) { return count <= 4 ? 4 : 9; }
inline int round_up_to_batch(int count) {
  return (count + centroid_batch(count) - 1) / centroid_batch(count) * centroid_batch(count);
}

template <class V>
inline void allocate_nearest(BumpAllocator& allocator, int count, int width, int centroids, NearestBuffers* b) {
  const std::size_t rows = static_cast<std::size_t>(count),
                    padded = static_cast<std::size_t>(round_up_to_lanes<V>(count));
  const std::size_t w = static_cast<std::size_t>(width),
                    groups = static_cast<std::size_t>(round_up_to_batch(centroids));
  b->rows = allocator.allocate<const float*>(padded);
  b->wide = allocator.allocate<float>(rows * w);
  b->lanes = allocator.allocate<float>(w * padded);
  b->centroids = allocator.allocate<const float*>(groups);
  b->half_squares = allocator.allocate<float>(groups);
  b->nearness = allocator.allocate<float>(groups * padded);
  b->top = allocator.allocate<float>(padded);
  b->assignment = allocator.allocate<int32_t>(padded);
}

// Lays out scratch; returns the bytes it takes.
template <class V>
inline std::size_t group_layout(const GroupTask& t, char* base, GroupBuffers* b) {
  BumpAllocator allocator{base};
  allocate_nearest<V>(allocator, t.queries, t.width, t.groups, &b->nearest);
  const std::size_t groups = static_cast<std::size_t>(t.groups), words = groups * static_cast<std::size_t>(t.width);
  b->centroid = allocator.allocate<float>(words);
  b->sum = allocator.allocate<float>(words);
  b->count = allocator.allocate<int32_t>(groups);
  return allocator.used;
}

template <class V>
inline std::size_t group_scratch(const GroupTask& t) {
  GroupBuffers b;
  return group_layout<V>(t, nullptr, &b);
}

// sum += row, both of `width` elements.
template <class V>
inline void add_row(const float* row, int width, float* sum) {
  for (int d = 0; d < width; d += V::lanes) V::store(sum + d, V::add(V::load(sum + d), V::load(row + d)));
}

// centroid[g] = mean of the queries that are pooled_queries of group g; an empty group keeps its centroid.
template <class V>
inline void mean_of_groups(const GroupTask& t, const GroupBuffers& b) {
  for (int i = 0; i < t.groups * t.width; i += V::lanes) V::store(b.sum + i, V::set(0.0f));
  for (int g = 0; g < t.groups; ++g) b.count[g] = 0;
  for (int s = 0; s < t.queries; ++s) {
    const int group = b.nearest.assignment[s];
    add_row<V>(b.nearest.rows[s], t.width, b.sum + group * t.width);
    ++b.count[group];
  }
  for (int g = 0; g < t.groups; ++g) {
    if (b.count[g] == 0) continue;
    const typename V::F factor = V::set(1.0f / static_cast<float>(b.count[g]));
    for (int d = g * t.width; d < (g + 1) * t.width; d += V::lanes)
      V::store(b.centroid + d, V::mul(V::load(b.sum + d), factor));
  }
}

// Widens `count` rows and transposes them into lanes.
template <class V>
inline void load_rows(const void* const* from, DType dtype, int count, int width, const NearestBuffers& b) {
  const int padded = round_up_to_lanes<V>(count);
  for (int s = 0; s < padded; ++s) {
    if (s >= count) {
      b.rows[s] = b.rows[0];
    } else if (dtype == DType::float32) {
      b.rows[s] = static_cast<const float*>(from[s]);
    } else {
      widen_row(from[s], dtype, width, b.wide + s * width);
      b.rows[s] = b.wide + s * width;
    }
  }
  for (int s = 0; s < padded; s += V::lanes)
    transpose_rows<V>(reinterpret_cast<const uint32_t* const*>(b.rows + s), width,
                      reinterpret_cast<uint32_t*>(b.lanes) + s, padded);
}

// The sum of 16 numbers, in pairs.
inline float add_up(float* parts) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  return parts[0];
}

// |a - b|^2 of rows of a multiple of 16 elements; one running sum would wait for each addition.
inline float square_distance(const float* a, const float* b, int width) {
  float sum[16] = {};
  for (int d = 0; d < width; d += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const float difference = a[d + lane] - b[d + lane];
      sum[lane] += difference * difference;
    }
  return add_up(sum);
}

inline float half_square(const float* row, int width) {
  float sum[16] = {};
  for (int d = 0; d < width; d += 16)
    for (int lane = 0; lane < 16; ++lane) sum[lane] += row[d + lane] * row[d + lane];
  return add_up(sum) / 2;
}

// nearness[g][s] = x.c - |c|^2 / 2, largest for the nearest centroid: |x - c|^2 without what all centroids share.
template <class V, int batch>
inline void measure_nearness(int padded, int width, int count, const NearestBuffers& b) {
  for (int first = 0; first < count; first += batch)
    for (int s = 0; s < padded; s += V::lanes) {
      typename V::F near[batch];
#pragma GCC unroll 16
      for (int j = 0; j < batch; ++j) near[j] = V::set(-b.half_squares[first + j]);
      for (int d = 0; d < width; ++d) {
        const typename V::F lanes = V::load(b.lanes + d * padded + s);
#pragma GCC unroll 16
        for (int j = 0; j < batch; ++j) near[j] = V::fma(lanes, V::set(b.centroids[first + j][d]), near[j]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < batch; ++j) V::store(b.nearness + (first + j) * padded + s, near[j]);
    }
}

// assignment[s] = number of the centroid nearest to row s, the first of equally near ones.
template <class V>
inline void find_nearest(int rows, int width, int count, const NearestBuffers& b) {
  const int padded = round_up_to_lanes<V>(rows), turns = round_up_to_batch(count);
  for (int g = count; g < turns; ++g) {
    b.centroids[g] = b.centroids[0];
    b.half_squares[g] = b.half_squares[0];
  }
  if (centroid_batch(count) == 4)
    measure_nearness<V, 4>(padded, width, turns, b);
  else
    measure_nearness<V, 9>(padded, width, turns, b);
  for (int s = 0; s < padded; ++s) {
    b.top[s] = b.nearness[s];
    b.assignment[s] = 0;
  }
  for (int g = 1; g < count; ++g)
    for (int s = 0; s < padded; ++s) {
      const bool nearer = b.nearness[g * padded + s] > b.top[s];
      b.top[s] = nearer ? b.nearness[g * padded + s] : b.top[s];
      b.assignment[s] = nearer ? g : b.assignment[s];
    }
}

// Lloyd steps from the groups a tile starts with; the centroids go to t.out[groups][width].
template <class V>
inline void group_tile(const GroupTask& t, void* memory) {
  GroupBuffers b;
  group_layout<V>(t, static_cast<char*>(memory), &b);
  load_rows<V>(t.q, t.dtype, t.queries, t.width, b.nearest);
  for (int s = 0; s < t.queries; ++s) b.nearest.assignment[s] = t.group_of[s];
  for (int g = 0; g < t.groups; ++g) b.nearest.centroids[g] = b.centroid + g * t.width;
  mean_of_groups<V>(t, b);
  for (int step = 0; step < t.steps; ++step) {
    for (int g = 0; g < t.groups; ++g) b.nearest.half_squares[g] = half_square(b.centroid + g * t.width, t.width);
    find_nearest<V>(t.queries, t.width, t.groups, b.nearest);
    mean_of_groups<V>(t, b);
  }
  const std::size_t row = static_cast<std::size_t>(t.width) * (t.dtype == DType::float32 ? 4 : 2);
  for (int g = 0; g < t.groups; ++g)
    store_row(b.centroid + g * t.width, 1.0f, t.width, t.dtype,
              static_cast<char*>(t.out) + static_cast<std::size_t>(g) * row);
}

template <class V>
inline std::size_t nearest_layout(const NearestTask& t, char* base, NearestBuffers* b) {
  BumpAllocator allocator{base};
  allocate_nearest<V>(allocator, t.count, t.width, t.candidates, b);
  return allocator.used;
}

template <class V>
inline std::size_t nearest_scratch(const NearestTask& t) {
  NearestBuffers b;
  return nearest_layout<V>(t, nullptr, &b);
}

template <class V>
inline void nearest(const NearestTask& t, void* memory) {
  NearestBuffers b;
  nearest_layout<V>(t, static_cast<char*>(memory), &b);
  load_rows<V>(t.rows, t.dtype, t.count, t.width, b);
  for (int g = 0; g < t.candidates; ++g) {
    b.centroids[g] = t.means[g];
    b.half_squares[g] = t.half_squares[g];
  }
  find_nearest<V>(t.count, t.width, t.candidates, b);
  for (int s = 0; s < t.count; ++s) {
    add_row<V>(b.rows[s], t.width, t.sums[b.assignment[s]]);
    t.nearest[s] = b.assignment[s];
  }
}

// |row - mean| for `count` rows `stride` elements apart.
inline void distances(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width, const float* mean,
                      float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float wide[kMaxWidth];
    const float* row = static_cast<const float*>(rows) + i * stride;
    if (dtype == DType::bfloat16) {
      widen_row(static_cast<const uint16_t*>(rows) + i * stride, dtype, static_cast<int>(width), wide);
      row = wide;
    }
    out[i] = __builtin_sqrtf(square_distance(row, mean, static_cast<int>(width)));
  }
}

}  // namespace
}  // namespace sparsifiner
