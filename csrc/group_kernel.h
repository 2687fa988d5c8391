// Representative queries of one tile, and how far values lie from the mean of their block. Included by the
// level_*.cpp files inside their anonymous namespace, after attend_kernel.h. Plain loops are vectorised by the
// compiler with the flags of the including file.

// Queries of a tile, padded to whole vectors.
template <class V>
inline int group_lanes(const GroupTask& t) { return (t.queries + V::lanes - 1) / V::lanes * V::lanes; }

struct GroupBuffers {
  float* q;         // [S][D]
  float* lanes;     // [D][padded S]; lanes beyond S repeat the first query
  float* centre;    // [G][D]
  float* sum;       // [G][D]
  float* nearness;  // [G][padded S]
  float* top;       // [padded S]
  int32_t* member;  // [padded S]
  int32_t* count;   // [G]
};

// Cuts scratch; returns the bytes it takes.
template <class V>
inline std::size_t group_layout(const GroupTask& t, char* base, GroupBuffers* b) {
  const int padded = group_lanes<V>(t);
  std::size_t used = 0;
  auto take = [&](int words) {
    char* start = base + used;
    used += (static_cast<std::size_t>(words) * 4 + 63) / 64 * 64;
    return start;
  };
  b->q = reinterpret_cast<float*>(take(t.queries * t.width));
  b->lanes = reinterpret_cast<float*>(take(t.width * padded));
  b->centre = reinterpret_cast<float*>(take(t.groups * t.width));
  b->sum = reinterpret_cast<float*>(take(t.groups * t.width));
  b->nearness = reinterpret_cast<float*>(take(t.groups * padded));
  b->top = reinterpret_cast<float*>(take(padded));
  b->member = reinterpret_cast<int32_t*>(take(padded));
  b->count = reinterpret_cast<int32_t*>(take(t.groups));
  return used;
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
    float* sum = b.sum + b.member[s] * t.width;
    const float* row = b.q + s * t.width;
    for (int d = 0; d < t.width; ++d) sum[d] += row[d];
    ++b.count[b.member[s]];
  }
  for (int g = 0; g < t.groups; ++g)
    for (int d = 0; b.count[g] > 0 && d < t.width; ++d)
      b.centre[g * t.width + d] = b.sum[g * t.width + d] / static_cast<float>(b.count[g]);
}

// nearness[g][s] = q.c - |c|^2 / 2, largest for the nearest centre: |q - c|^2 without what all centres share.
template <class V>
inline void nearness_of_groups(const GroupTask& t, int padded, const GroupBuffers& b) {
  constexpr int together = 4;  // independent sums, to hide the latency of each
  for (int first = 0; first < t.groups; first += together) {
    const float* centre[together];
    float half[together];
    for (int j = 0; j < together; ++j) {
      centre[j] = b.centre + (first + j < t.groups ? first + j : t.groups - 1) * t.width;
      float square = 0.0f;
      for (int d = 0; d < t.width; ++d) square += centre[j][d] * centre[j][d];
      half[j] = -0.5f * square;
    }
    for (int s = 0; s < padded; s += V::lanes) {
      typename V::F near[together];
      for (int j = 0; j < together; ++j) near[j] = V::set(half[j]);
      for (int d = 0; d < t.width; ++d) {
        const typename V::F lanes = V::load(b.lanes + d * padded + s);
        for (int j = 0; j < together; ++j) near[j] = V::fma(lanes, V::set(centre[j][d]), near[j]);
      }
      for (int j = 0; j < together && first + j < t.groups; ++j) V::store(b.nearness + (first + j) * padded + s, near[j]);
    }
  }
}

// Lloyd steps from the groups a tile starts with; the centres go to t.out[groups][width].
template <class V>
inline void group_tile(const GroupTask& t, void* memory) {
  const int padded = group_lanes<V>(t);
  GroupBuffers b;
  group_layout<V>(t, static_cast<char*>(memory), &b);
  const uint32_t* rows[V::lanes];
  for (int s = 0; s < padded; ++s) {
    if (s < t.queries) widen_row(t.q[s], t.dtype, t.width, b.q + s * t.width);
    b.member[s] = s < t.queries ? t.group_of[s] : 0;
    rows[s % V::lanes] = reinterpret_cast<const uint32_t*>(b.q + (s < t.queries ? s : 0) * t.width);
    if ((s + 1) % V::lanes != 0) continue;
    float* lanes = b.lanes + s + 1 - V::lanes;
    if constexpr (V::lanes == 16) {
      for (int d = 0; d < t.width; d += 16) V::transpose(rows, d, reinterpret_cast<uint32_t*>(lanes + d * padded), padded);
    } else {
      for (int d = 0; d < t.width; ++d)
        for (int lane = 0; lane < V::lanes; ++lane) std::memcpy(lanes + d * padded + lane, rows[lane] + d, 4);
    }
  }
  mean_of_groups(t, b);
  for (int step = 0; step < t.steps; ++step) {
    nearness_of_groups<V>(t, padded, b);
    for (int s = 0; s < padded; ++s) {
      b.top[s] = b.nearness[s];
      b.member[s] = 0;
    }
    for (int g = 1; g < t.groups; ++g)
      for (int s = 0; s < padded; ++s) {
        const bool nearer = b.nearness[g * padded + s] > b.top[s];
        b.top[s] = nearer ? b.nearness[g * padded + s] : b.top[s];
        b.member[s] = nearer ? g : b.member[s];
      }
    mean_of_groups(t, b);
  }
  const std::size_t row = static_cast<std::size_t>(t.width) * (t.dtype == DType::float32 ? 4 : 2);
  for (int g = 0; g < t.groups; ++g)
    store_row(b.centre + g * t.width, 1.0f, t.width, t.dtype, static_cast<char*>(t.out) + static_cast<std::size_t>(g) * row);
}

// |row - mean| for `count` rows `stride` elements apart.
inline void distances(const void* rows, DType dtype, int64_t count, int64_t stride, int64_t width, const float* mean,
                      float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float row[128], sum[16] = {};
    const std::size_t offset = static_cast<std::size_t>(i * stride) * (dtype == DType::float32 ? 4 : 2);
    widen_row(static_cast<const char*>(rows) + offset, dtype, static_cast<int>(width), row);
    for (int64_t d = 0; d < width; d += 16)
      for (int lane = 0; lane < 16; ++lane) {
        const float difference = row[d + lane] - mean[d + lane];
        sum[lane] += difference * difference;
      }
    float total = 0.0f;
    for (float part : sum) total += part;
    out[i] = __builtin_sqrtf(total);
  }
}
