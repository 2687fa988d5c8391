// Tests of the core without Python, meant for the sanitizer builds: every level against plain loops in
// double precision, and refusals. stress.cpp has the many threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparsifiner.h"

namespace sp = sparsifiner;

namespace {

int failures = 0;

void expect(bool condition, const char* what, const char* level) {
  if (condition) return;
  std::fprintf(stderr, "FAILED at level %s: %s\n", level, what);
  ++failures;
}

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Random inputs exactly as large as promised, so that any access beyond them is an error to ASan.
struct Case {
  sp::AttentionShape s;
  bool half, padded;
  std::vector<float> qkv, tail, bias, tail_bias;
  std::vector<uint16_t> qkv16, tail16;
  std::vector<int32_t> tile_tokens, indices;

  Case(std::mt19937& random, bool half_) : half(half_) {
    auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    s.batch = pick(1, 2);
    s.heads = pick(1, 3);
    s.width = 16 * pick(1, 8);
    s.prefix = pick(0, 3);
    const int64_t patches = pick(1, 150);
    s.tokens = s.prefix + patches;
    s.tile_size = pick(1, 40);
    s.tiles = (patches + s.tile_size - 1) / s.tile_size;
    s.kept = pick(1, s.tokens);
    s.pooled = pick(0, 1) * pick(1, 20);
    padded = pick(0, 1) == 1;
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& to, std::vector<uint16_t>& to16, int64_t count) {
      to.resize(count);
      for (float& x : to) x = normal(random);
      if (!half) return;
      to16.resize(count);
      for (int64_t i = 0; i < count; ++i) to[i] = widen(to16[i] = narrow(to[i]));
    };
    fill(qkv, qkv16, s.batch * s.tokens * 3 * s.heads * s.width);
    fill(tail, tail16, 2 * s.batch * s.heads * s.pooled * s.width);
    const int64_t rows = s.batch * s.heads * s.tiles;
    if (s.pooled > 0) tail_bias.resize(rows * s.pooled);
    for (float& x : tail_bias) x = normal(random);
    tile_tokens.assign(s.tiles * s.tile_size, -1);
    for (int64_t i = 0; i < patches; ++i) tile_tokens[i] = static_cast<int32_t>(s.prefix + i);
    std::vector<int32_t> all(s.tokens);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t r = 0; r < rows; ++r) {
      std::shuffle(all.begin(), all.end(), random);
      indices.insert(indices.end(), all.begin(), all.begin() + s.kept);
    }
    if (padded)
      for (std::size_t i = 0; i < indices.size(); ++i) bias.push_back(pick(0, 2) == 0 ? -INFINITY : normal(random));
  }

  sp::Attention problem(void* out) const {
    sp::Attention p;
    p.shape = s;
    p.dtype = half ? sp::DType::bfloat16 : sp::DType::float32;
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    const int64_t element = half ? 2 : 4, c = s.heads * s.width;
    const char* base = half ? reinterpret_cast<const char*>(qkv16.data()) : reinterpret_cast<const char*>(qkv.data());
    p.q = {base, s.tokens * 3 * c, s.width, 3 * c};
    p.k = {base + element * c, s.tokens * 3 * c, s.width, 3 * c};
    p.v = {base + element * 2 * c, s.tokens * 3 * c, s.width, 3 * c};
    const char* pooled = half ? reinterpret_cast<const char*>(tail16.data()) : reinterpret_cast<const char*>(tail.data());
    p.tail_k = {pooled, s.heads * s.pooled * s.width, s.pooled * s.width, s.width};
    p.tail_v = p.tail_k;
    if (s.pooled > 0) p.tail_v.data = pooled + element * s.batch * s.heads * s.pooled * s.width;
    p.tile_tokens = tile_tokens.data();
    p.indices = indices.data();
    p.bias = padded ? bias.data() : nullptr;
    p.tail_bias = s.pooled > 0 ? tail_bias.data() : nullptr;
    p.out = out;
    return p;
  }

  const float* row(int part, int64_t b, int64_t h, int64_t n) const {
    return qkv.data() + ((b * s.tokens + n) * 3 + part) * s.heads * s.width + h * s.width;
  }

  void expected_row(int64_t b, int64_t h, int64_t token, int64_t tile, std::vector<double>& out) const {
    std::vector<const float*> k, v;
    std::vector<double> logit;
    const int64_t r = (b * s.heads + h) * s.tiles + tile;
    const int64_t count = tile < 0 ? s.tokens : s.kept;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = tile < 0 ? i : indices[r * s.kept + i];
      k.push_back(row(1, b, h, key));
      v.push_back(row(2, b, h, key));
      logit.push_back(tile >= 0 && padded ? bias[r * s.kept + i] : 0.0);
    }
    for (int64_t i = 0; tile >= 0 && i < s.pooled; ++i) {
      const float* pooled = tail.data() + ((b * s.heads + h) * s.pooled + i) * s.width;
      k.push_back(pooled);
      v.push_back(pooled + s.batch * s.heads * s.pooled * s.width);
      logit.push_back(tail_bias[r * s.pooled + i]);
    }
    double max = -INFINITY, sum = 0;
    const double scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    for (std::size_t i = 0; i < k.size(); ++i) {
      for (int64_t d = 0; d < s.width; ++d) logit[i] += scale * row(0, b, h, token)[d] * k[i][d];
      max = std::max(max, logit[i]);
    }
    out.assign(s.width, 0.0);
    if (max == -INFINITY) return;
    for (std::size_t i = 0; i < k.size(); ++i) {
      const double weight = std::exp(logit[i] - max);
      sum += weight;
      for (int64_t d = 0; d < s.width; ++d) out[d] += weight * v[i][d];
    }
    for (double& x : out) x /= sum;
  }

  double error(const std::vector<float>& got) const {
    double worst = 0;
    std::vector<double> want;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t n = 0; n < s.tokens; ++n) {
          expected_row(b, h, n, n < s.prefix ? -1 : (n - s.prefix) / s.tile_size, want);
          for (int64_t d = 0; d < s.width; ++d)
            worst = std::max(worst, std::fabs(want[d] - got[((b * s.tokens + n) * s.heads + h) * s.width + d]));
        }
    return worst;
  }
};

void test_attention(std::mt19937& random, const char* level) {
  for (bool half : {false, true}) {
    const Case c(random, half);
    const std::size_t size = c.s.batch * c.s.tokens * c.s.heads * c.s.width;
    std::vector<float> out(half ? 0 : size);
    std::vector<uint16_t> out16(half ? size : 0);
    sp::attend(c.problem(half ? static_cast<void*>(out16.data()) : out.data()), 2);
    for (uint16_t x : out16) out.push_back(widen(x));
    // Values of size 4 rounded to 8 bits, the weights likewise; float32 carries 24.
    expect(c.error(out) < (half ? 4 * 0.0078125 : 1e-5), half ? "bfloat16 attention" : "float32 attention", level);
  }
}

void test_bad_indices(std::mt19937& random, const char* level) {
  Case c(random, false);
  std::vector<float> out(c.s.batch * c.s.tokens * c.s.heads * c.s.width);
  for (int64_t bad : {int64_t{-1}, c.s.tokens, int64_t{2147483647}}) {
    c.indices.back() = static_cast<int32_t>(bad);
    bool refused = false;
    try {
      sp::attend(c.problem(out.data()), 2);
    } catch (const std::out_of_range&) {
      refused = true;
    }
    expect(refused, "bad index refused", level);
  }
}

void test_topk(std::mt19937& random, const char* level) {
  const int64_t rows = 3, columns = std::uniform_int_distribution<int64_t>(1, 300)(random);
  const int64_t k = std::uniform_int_distribution<int64_t>(1, columns)(random);
  const bool coarse = random() % 2;
  std::normal_distribution<float> normal;
  std::vector<float> scores(rows * columns);
  for (float& x : scores) x = coarse ? std::round(normal(random)) : normal(random);
  std::vector<int32_t> got(rows * k), order(columns);
  sp::topk(scores.data(), sp::DType::float32, rows, columns, columns, k, got.data(), k, 0, 2);
  bool same = true;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores.data() + r * columns;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    std::sort(order.begin(), order.begin() + k);
    same = same && std::equal(order.begin(), order.begin() + k, got.begin() + r * k);
  }
  expect(same, "top-k", level);
  scores[random() % scores.size()] = NAN;
  bool refused = false;
  try {
    sp::topk(scores.data(), sp::DType::float32, rows, columns, columns, k, got.data(), k, 0, 2);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "NaN refused", level);
}

// One query per tile: the selected keys must be those of the largest weighted probabilities. The inputs are
// bfloat16 numbers also where they are given in float32: some levels round them.
void test_tile_keys(std::mt19937& random, const char* level, bool half) {
  Case c(random, true);
  c.half = half;
  sp::TileKeys p;
  p.batch = c.s.batch;
  p.heads = c.s.heads;
  p.tokens = c.s.tokens;
  p.width = c.s.width;
  p.first = c.s.prefix;
  p.count = std::uniform_int_distribution<int64_t>(1, p.tokens - p.first)(random);
  p.dtype = half ? sp::DType::bfloat16 : sp::DType::float32;
  p.scale = 1.0f;
  p.sum = false;
  p.q = c.problem(nullptr).q;
  p.k = c.problem(nullptr).k;
  p.members = 1;  // each token is a tile of its own
  p.tiles = p.tokens;
  const int64_t candidates = p.tokens - p.first;
  std::vector<float> weight(random() % 2 ? p.batch * p.heads * candidates : 0);
  std::normal_distribution<float> normal;
  for (float& w : weight) w = normal(random);
  if (!weight.empty()) p.log2_weight = weight.data();
  std::vector<int32_t> got(p.batch * p.heads * p.tiles * (p.first + p.count));
  p.indices = got.data();
  sp::tile_keys(p, 2);
  bool best = true;
  std::vector<double> score(p.tokens);
  for (int64_t r = 0; r < p.batch * p.heads * p.tiles; ++r) {
    const int64_t t = r % p.tiles, h = r / p.tiles % p.heads, b = r / p.tiles / p.heads;
    for (int64_t n = 0; n < p.tokens; ++n) {
      score[n] = 0;
      for (int64_t d = 0; d < p.width; ++d) score[n] += c.row(0, b, h, t)[d] * c.row(1, b, h, n)[d];
      if (!weight.empty() && n >= p.first)
        score[n] += std::log(2.0) * weight[(b * p.heads + h) * candidates + n - p.first];
    }
    const int32_t* row = got.data() + r * (p.first + p.count);
    std::vector<bool> chosen(p.tokens);
    for (int64_t i = 0; i < p.first + p.count; ++i) chosen[row[i]] = true;
    double worst_chosen = INFINITY, best_left = -INFINITY;
    for (int64_t n = p.first; n < p.tokens; ++n) {
      if (chosen[n]) worst_chosen = std::min(worst_chosen, score[n]);
      else best_left = std::max(best_left, score[n]);
    }
    best = best && worst_chosen >= best_left - 1e-3;
  }
  expect(best, "tile keys", level);
}

// Without steps the groups are plain means; with steps every group stays a mean of finite queries.
void test_tile_groups(std::mt19937& random, const char* level) {
  const Case c(random, false);
  sp::TileGroups p;
  p.batch = c.s.batch;
  p.heads = c.s.heads;
  p.tokens = c.s.tokens;
  p.width = c.s.width;
  p.tiles = c.s.tiles;
  p.tile_size = c.s.tile_size;
  p.groups = 1 + random() % p.tile_size;
  p.dtype = sp::DType::float32;
  p.q = c.problem(nullptr).q;
  p.tile_tokens = c.tile_tokens.data();
  std::vector<int32_t> start(p.tile_size);
  for (int64_t i = 0; i < p.tile_size; ++i) start[i] = static_cast<int32_t>(i % p.groups);
  p.group_of = start.data();
  std::vector<float> out(p.batch * p.heads * p.tiles * p.groups * p.width);
  p.out = out.data();
  for (int64_t steps : {3, 0}) {
    p.steps = steps;
    sp::group_queries(p, 2);
    for (float x : out) expect(std::isfinite(x), "groups are finite", level);
  }
  double sum = 0, size = 0;
  for (int64_t i = 0; i < p.tile_size; i += p.groups, ++size)
    sum += c.row(0, 0, 0, c.tile_tokens[c.tile_tokens[i] < 0 ? 0 : i])[0];
  expect(std::fabs(out[0] - sum / size) < 1e-5, "groups start as means", level);
  const sp::BlockGrid grid{c.s.prefix, 1, c.s.tokens - c.s.prefix, 1, 3};
  std::vector<float> distance(p.batch * p.heads * c.s.tokens);
  sp::block_distances(p.q, p.dtype, p.batch, p.heads, p.width, grid, distance.data(), 2);
  for (float x : distance) expect(x >= 0.0f, "distances are not negative", level);
}

void test_pooling(std::mt19937& random, const char* level) {
  auto pick = [&](int64_t high) { return std::uniform_int_distribution<int64_t>(1, high)(random); };
  sp::BlockGrid grid{pick(3) - 1, pick(9), pick(9), 1, 1};
  grid.block_rows = pick(grid.rows);
  grid.block_columns = pick(grid.columns);
  const int64_t tokens = grid.prefix + grid.rows * grid.columns, width = 16 * pick(3);
  std::vector<float> x(tokens * width), out(grid.blocks() * width);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  sp::pool_blocks({x.data(), tokens * width, tokens * width, width}, sp::DType::float32, 1, 1, width, grid, out.data(), 2);
  std::vector<double> sum(out.size());
  std::vector<int> size(grid.blocks());
  std::vector<int32_t> kept;
  std::vector<int> left(grid.blocks());
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t c = 0; c < grid.columns; ++c) {
      const int64_t block = y / grid.block_rows * grid.horizontal() + c / grid.block_columns;
      const int64_t token = grid.prefix + y * grid.columns + c;
      ++size[block];
      if (random() % 2) kept.push_back(static_cast<int32_t>(token));
      else ++left[block];
      for (int64_t d = 0; d < width; ++d) sum[block * width + d] += x[token * width + d];
    }
  bool close = true;
  for (std::size_t i = 0; i < out.size(); ++i) close = close && std::fabs(out[i] - sum[i] / size[i / width]) < 1e-5;
  expect(close, "pooling", level);
  std::vector<float> counts(grid.blocks());
  sp::log_counts(kept.data(), nullptr, 1, static_cast<int64_t>(kept.size()), grid, counts.data(), 2);
  bool exact = true;
  for (std::size_t b = 0; b < counts.size(); ++b) exact = exact && counts[b] == std::log(static_cast<float>(left[b]));
  expect(exact, "log-counts", level);
}

}  // namespace

int main() {
  std::vector<std::string> levels{"amx_emulated"};
  for (sp::Level level : sp::available_levels()) levels.push_back(sp::level_name(level));
  for (const std::string& level : levels) {
    const char* name = level.c_str();
    sp::force_level(name);
    std::mt19937 random(7);
    for (int i = 0; i < 40; ++i) {
      test_attention(random, name);
      test_bad_indices(random, name);
      test_topk(random, name);
      test_tile_keys(random, name, i % 2 == 1);
      test_tile_groups(random, name);
      test_pooling(random, name);
    }
  }
  if (failures == 0) std::printf("all core tests passed\n");
  return failures == 0 ? 0 : 1;
}
