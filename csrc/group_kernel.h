// Representative queries of one tile, the nearest mean of some rows, and how far rows lie from one. Included by the
// level_*.cpp files inside their anonymous namespace, after attend_kernel.h. Plain loops are vectorised by the
// compiler with the flags of the including file.

// A number of rows, padded to whole vectors.
template <class V>
inline int whole_vectors(int count) { return (count + V::lanes - 1) / V::lanes * V::lanes; }

// What it takes to find the nearest of G centres for S rows.
struct NearestBuffers {
  const float** rows;      // [padded S], each [D]; those beyond S repeat the first
  float* wide;             // [S][D], rows that were not float32
  float* lanes;            // [D][padded S]
  const float** centres;   // [padded G], each [D]
  float* half_squares;     // [padded G]: |centre|^2 / 2
  float* nearness;         // [padded G][padded S]
  float* top;              // [padded S]
  int32_t* member;         // [padded S]
};

struct GroupBuffers {
  NearestBuffers nearest;
  float* centre;   // [G][D]
  float* sum;      // [G][D]
  int32_t* count;  // [G]
};

// Centres that are measured together, so that the products of one need not wait for each other: the 2x2 groups of a
// tile's queries, or a block and those around it.
inline int centres_together(int count) { return count <= 4 ? 4 : 9; }
inline int whole_turns(int count) { return (count + centres_together(count) - 1) / centres_together(count) * centres_together(count); }

template <class V>
inline void cut(Cutter& memory, int count, int width, int centres, NearestBuffers* b) {
  const std::size_t rows = static_cast<std::size_t>(count), padded = static_cast<std::size_t>(whole_vectors<V>(count));
  const std::size_t w = static_cast<std::size_t>(width), groups = static_cast<std::size_t>(whole_turns(centres));
  b->rows = memory.take<const float*>(padded);
  b->wide = memory.take<float>(rows * w);
  b->lanes = memory.take<float>(w * padded);
  b->centres = memory.take<const float*>(groups);
  b->half_squares = memory.take<float>(groups);
  b->nearness = memory.take<float>(groups * padded);
  b->top = memory.take<float>(padded);
  b->member = memory.take<int32_t>(padded);
}

// Cuts scratch; returns the bytes it takes.
template <class V>
inline std::size_t group_layout(const GroupTask& t, char* base, GroupBuffers* b) {
  Cutter memory{base};
  cut<V>(memory, t.queries, t.width, t.groups, &b->nearest);
  const std::size_t groups = static_cast<std::size_t>(t.groups), words = groups * static_cast<std::size_t>(t.width);
  b->centre = memory.take<float>(words);
  b->sum = memory.take<float>(words);
  b->count = memory.take<int32_t>(groups);
  return memory.used;
}

template <class V>
inline std::size_t group_scratch(const GroupTask& t) {
  GroupBuffers b;
  return group_layout<V>(t, nullptr, &b);
}

// centre[g] = mean of the queries that are members of group g; an empty group keeps its centre.
inline void mean_of_groups(const GroupTask& t, const GroupBuffers& b) {
  for (int i = 0; i < t.groups * t.width; ++i) b.sum[i] = 0.0f;
  for (int g = 0; g < t.groups; ++g) b.count[g] = 0;
  for (int s = 0; s < t.queries; ++s) {
    float* sum = b.sum + b.nearest.member[s] * t.width;
    const float* row = b.nearest.rows[s];
    for (int d = 0; d < t.width; ++d) sum[d] += row[d];
    ++b.count[b.nearest.member[s]];
  }
  for (int g = 0; g < t.groups; ++g)
    for (int d = 0; b.count[g] > 0 && d < t.width; ++d)
      b.centre[g * t.width + d] = b.sum[g * t.width + d] / static_cast<float>(b.count[g]);
}

// Widens `count` rows and transposes them into lanes.
template <class V>
inline void load_rows(const void* const* from, DType dtype, int count, int width, const NearestBuffers& b) {
  const int padded = whole_vectors<V>(count);
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
    transpose_rows<V>(reinterpret_cast<const uint32_t* const*>(b.rows + s), width, reinterpret_cast<uint32_t*>(b.lanes) + s,
                      padded);
}

// |a - b|^2 of rows of a multiple of 16 elements; one running sum would wait for each addition.
inline float square_distance(const float* a, const float* b, int width) {
  float sum[16] = {};
  for (int d = 0; d < width; d += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const float difference = a[d + lane] - b[d + lane];
      sum[lane] += difference * difference;
    }
  float total = 0.0f;
  for (float part : sum) total += part;
  return total;
}

inline float half_square(const float* row, int width) {
  const float zero[kMaxWidth] = {};
  return square_distance(row, zero, width) / 2;
}

// nearness[g][s] = x.c - |c|^2 / 2, largest for the nearest centre: |x - c|^2 without what all centres share.
template <class V, int together>
inline void measure_nearness(int padded, int width, int count, const NearestBuffers& b) {
  for (int first = 0; first < count; first += together)
    for (int s = 0; s < padded; s += V::lanes) {
      typename V::F near[together];
#pragma GCC unroll 16
      for (int j = 0; j < together; ++j) near[j] = V::set(-b.half_squares[first + j]);
      for (int d = 0; d < width; ++d) {
        const typename V::F lanes = V::load(b.lanes + d * padded + s);
#pragma GCC unroll 16
        for (int j = 0; j < together; ++j) near[j] = V::fma(lanes, V::set(b.centres[first + j][d]), near[j]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < together; ++j) V::store(b.nearness + (first + j) * padded + s, near[j]);
    }
}

// member[s] = number of the centre nearest to row s, the first of equally near ones.
template <class V>
inline void find_nearest(int rows, int width, int count, const NearestBuffers& b) {
  const int padded = whole_vectors<V>(rows), turns = whole_turns(count);
  for (int g = count; g < turns; ++g) {
    b.centres[g] = b.centres[0];
    b.half_squares[g] = b.half_squares[0];
  }
  if (centres_together(count) == 4)
    measure_nearness<V, 4>(padded, width, turns, b);
  else
    measure_nearness<V, 9>(padded, width, turns, b);
  for (int s = 0; s < padded; ++s) {
    b.top[s] = b.nearness[s];
    b.member[s] = 0;
  }
  for (int g = 1; g < count; ++g)
    for (int s = 0; s < padded; ++s) {
      const bool nearer = b.nearness[g * padded + s] > b.top[s];
      b.top[s] = nearer ? b.nearness[g * padded + s] : b.top[s];
      b.member[s] = nearer ? g : b.member[s];
    }
}

// Lloyd steps from the groups a tile starts with; the centres go to t.out[groups][width].
template <class V>
inline void group_tile(const GroupTask& t, void* memory) {
  GroupBuffers b;
  group_layout<V>(t, static_cast<char*>(memory), &b);
  load_rows<V>(t.q, t.dtype, t.queries, t.width, b.nearest);
  for (int s = 0; s < t.queries; ++s) b.nearest.member[s] = t.group_of[s];
  for (int g = 0; g < t.groups; ++g) b.nearest.centres[g] = b.centre + g * t.width;
  mean_of_groups(t, b);
  for (int step = 0; step < t.steps; ++step) {
    for (int g = 0; g < t.groups; ++g) b.nearest.half_squares[g] = half_square(b.centre + g * t.width, t.width);
    find_nearest<V>(t.queries, t.width, t.groups, b.nearest);
    mean_of_groups(t, b);
  }
  const std::size_t row = static_cast<std::size_t>(t.width) * (t.dtype == DType::float32 ? 4 : 2);
  for (int g = 0; g < t.groups; ++g)
    store_row(b.centre + g * t.width, 1.0f, t.width, t.dtype, static_cast<char*>(t.out) + static_cast<std::size_t>(g) * row);
}

template <class V>
inline std::size_t nearest_layout(const NearestTask& t, char* base, NearestBuffers* b) {
  Cutter memory{base};
  cut<V>(memory, t.count, t.width, t.candidates, b);
  return memory.used;
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
    b.centres[g] = t.means[g];
    b.half_squares[g] = t.half_squares[g];
  }
  find_nearest<V>(t.count, t.width, t.candidates, b);
  for (int s = 0; s < t.count; ++s) {
    float* sum = t.sums[b.member[s]];
    for (int d = 0; d < t.width; ++d) sum[d] += b.rows[s][d];
    t.nearest[s] = b.member[s];
  }
}

// |row - mean| for `count` rows `stride` elements apart.
inline void distances(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width, const float* mean,
                      float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float row[kMaxWidth];
    const std::size_t offset = static_cast<std::size_t>(i * stride) * (dtype == DType::float32 ? 4 : 2);
    widen_row(static_cast<const char*>(rows) + offset, dtype, static_cast<int>(width), row);
    out[i] = __builtin_sqrtf(square_distance(row, mean, static_cast<int>(width)));
  }
}
