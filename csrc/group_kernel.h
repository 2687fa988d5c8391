// Representative queries of one tile, and how far values lie from the mean of their block. Plain loops over
// lanes that the compiler vectorises with the flags of the including level_*.cpp file.

inline void widen_row(const void* from, DType dtype, int width, float* to) {
  if (dtype == DType::float32)
    std::memcpy(to, from, static_cast<std::size_t>(width) * 4);
  else
    widen(static_cast<const uint16_t*>(from), reinterpret_cast<uint32_t*>(to), width);
}

// centre[g] = mean of the queries that are members of group g; an empty group keeps its centre.
inline void mean_of_groups(const GroupTask& t, const float* q, const int32_t* member, float* centre) {
  for (int g = 0; g < t.groups; ++g) {
    float sum[128] = {};
    int count = 0;
    for (int s = 0; s < t.queries; ++s) {
      if (member[s] != g) continue;
      for (int d = 0; d < t.width; ++d) sum[d] += q[s * t.width + d];
      ++count;
    }
    if (count == 0) continue;
    for (int d = 0; d < t.width; ++d) centre[g * t.width + d] = sum[d] / static_cast<float>(count);
  }
}

// Lloyd steps from the groups a tile starts with; the centres go to t.out[groups][width].
inline void group_tile(const GroupTask& t, void* memory) {
  float* q = static_cast<float*>(memory);        // [S][D]
  float* lanes = q + t.queries * t.width;        // [D][S]
  float* centre = lanes + t.queries * t.width;   // [G][D]
  float* nearness = centre + t.groups * t.width; // [G][S]
  int32_t* member = reinterpret_cast<int32_t*>(nearness + t.groups * t.queries);
  for (int s = 0; s < t.queries; ++s) {
    widen_row(t.q[s], t.dtype, t.width, q + s * t.width);
    for (int d = 0; d < t.width; ++d) lanes[d * t.queries + s] = q[s * t.width + d];
    member[s] = t.group_of[s];
  }
  mean_of_groups(t, q, member, centre);
  for (int step = 0; step < t.steps; ++step) {
    // The nearest centre: |q - c|^2 without the part that is the same for all centres.
    for (int g = 0; g < t.groups; ++g) {
      const float* c = centre + g * t.width;
      float* near = nearness + g * t.queries;
      float square = 0.0f;
      for (int d = 0; d < t.width; ++d) square += c[d] * c[d];
      for (int s = 0; s < t.queries; ++s) near[s] = -0.5f * square;
      for (int d = 0; d < t.width; ++d)
        for (int s = 0; s < t.queries; ++s) near[s] += c[d] * lanes[d * t.queries + s];
    }
    for (int s = 0; s < t.queries; ++s) {
      int best = 0;
      for (int g = 1; g < t.groups; ++g)
        if (nearness[g * t.queries + s] > nearness[best * t.queries + s]) best = g;
      member[s] = best;
    }
    mean_of_groups(t, q, member, centre);
  }
  const std::size_t row = static_cast<std::size_t>(t.width) * (t.dtype == DType::float32 ? 4 : 2);
  for (int g = 0; g < t.groups; ++g)
    store_row(centre + g * t.width, 1.0f, t.width, t.dtype, static_cast<char*>(t.out) + static_cast<std::size_t>(g) * row);
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
