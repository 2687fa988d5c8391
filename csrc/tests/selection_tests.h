// Tests of the functions that choose keys: against plain loops in double precision.
#pragma once

#include <stdexcept>

#include "tests/random_case.h"

namespace {

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

// Steps of 1/32, the largest magnitude of each row 127/32: exact as bfloat16 and as bytes.
void make_exact(Case& c) {
  for (std::size_t i = 0; i < c.qkv.size(); ++i) {
    const float steps = i % c.s.width == 0 ? 127.0f : std::round(32.0f * c.qkv[i]);
    c.qkv[i] = std::min(127.0f, std::max(-127.0f, steps)) / 32.0f;
    c.qkv16[i] = narrow(c.qkv[i]);
  }
}

// One query per tile: the selected keys must be those of the largest weighted probabilities. Some levels round
// queries and keys, so they are numbers which that does not change.
void test_tile_keys(std::mt19937& random, const char* level, bool half) {
  Case c(random, true);
  make_exact(c);
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
  p.pooled_queries = 1;  // each token is a tile of its own
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
      if (chosen[n])
        worst_chosen = std::min(worst_chosen, score[n]);
      else
        best_left = std::max(best_left, score[n]);
    }
    best = best && worst_chosen >= best_left - 1e-3;
  }
  expect(best, "tile keys", level);
}

// Where every block is let through, the selected keys must be those with the largest weighted probabilities, by plain
// loops; where some are not, keys come from no more blocks than asked for.
void test_screened_keys(std::mt19937& random, const char* level, bool half) {
  auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  const int64_t shapes[][2] = {{2, 2}, {1, 4}, {4, 1}}, *shape = shapes[pick(0, 2)];
  sp::ScreenedKeys p{};
  sp::TileKeys& t = p.tiles;
  p.grid = {pick(0, 2), pick(1, 13), pick(1, 13), shape[0], shape[1]};
  t.batch = 1;
  t.heads = pick(1, 2);
  t.first = p.grid.prefix;
  const int64_t patches = p.grid.rows * p.grid.columns, blocks = p.grid.blocks();
  t.tokens = t.first + patches;
  t.width = 16 * pick(1, 8);
  t.tiles = pick(1, 5);
  t.pooled_queries = pick(1, 6);
  t.scale = 0.3f;
  t.dtype = half ? sp::DType::bfloat16 : sp::DType::float32;
  std::normal_distribution<float> normal;
  std::vector<uint16_t> q16, k16;
  auto rows = [&](int64_t count, std::vector<uint16_t>& to16) {
    std::vector<float> to(count * t.width);
    for (float& x : to) to16.push_back(narrow(normal(random))), x = widen(to16.back());
    return to;
  };
  const std::vector<float> q = rows(t.heads * t.tiles * t.pooled_queries, q16), k = rows(t.heads * t.tokens, k16);
  auto data = [&](const std::vector<float>& x, const std::vector<uint16_t>& x16) {
    return half ? static_cast<const void*>(x16.data()) : x.data();
  };
  t.q = {data(q, q16), t.heads * t.tiles * t.pooled_queries * t.width, t.tiles * t.pooled_queries * t.width, t.width};
  t.k = {data(k, k16), t.heads * t.tokens * t.width, t.tokens * t.width, t.width};
  std::vector<float> weight(random() % 2 ? t.heads * patches : 0);
  for (float& w : weight) w = normal(random);
  if (!weight.empty()) t.log2_weight = weight.data();

  const auto block_of = [&](int64_t patch) {
    return patch / p.grid.columns / p.grid.block_rows * p.grid.horizontal() +
           patch % p.grid.columns / p.grid.block_columns;
  };
  const auto choose = [&](int64_t num_blocks) {
    std::vector<int32_t> got(t.heads * t.tiles * (t.first + t.count));
    t.indices = got.data();
    p.num_blocks = num_blocks;
    sp::screened_keys(p, 2);
    return got;
  };
  t.count = pick(1, patches);
  const std::vector<int32_t> all = choose(blocks);
  bool best = true;
  for (int64_t list = 0; list < t.heads * t.tiles; ++list) {
    std::vector<double> score(patches, -INFINITY);
    for (int64_t m = 0; m < t.pooled_queries; ++m) {
      const float* query = q.data() + (list * t.pooled_queries + m) * t.width;
      const auto key = [&](int64_t n) { return k.data() + (list / t.tiles * t.tokens + t.first + n) * t.width; };
      double sum = 0;
      for (int64_t n = 0; n < patches; ++n) {
        double logit = 0;
        for (int64_t d = 0; d < t.width; ++d) logit += t.scale * query[d] * key(n)[d];
        sum += std::exp(logit);
      }
      for (int64_t n = 0; n < patches; ++n) {
        double logit = weight.empty() ? 0 : std::log(2.0) * weight[list / t.tiles * patches + n];
        for (int64_t d = 0; d < t.width; ++d) logit += t.scale * query[d] * key(n)[d];
        score[n] = std::max(score[n], logit - std::log(sum));
      }
    }
    double worst_chosen = INFINITY;
    for (int64_t i = t.first; i < t.first + t.count; ++i) {
      double& chosen = score[all[list * (t.first + t.count) + i] - t.first];
      worst_chosen = std::min(worst_chosen, chosen);
      chosen = -INFINITY;
    }
    best = best && worst_chosen >= *std::max_element(score.begin(), score.end()) - 1e-3;
  }
  expect(best, "screened keys, all blocks", level);

  const int64_t empty = blocks * 4 - patches;
  const int64_t num_blocks = pick((empty + 4) / 4, blocks);
  t.count = pick(1, num_blocks * 4 - empty);
  const std::vector<int32_t> some = choose(num_blocks);
  bool right = true;
  for (int64_t list = 0; list < t.heads * t.tiles; ++list) {
    const int32_t* row = some.data() + list * (t.first + t.count);
    std::vector<bool> seen(blocks);
    for (int64_t i = 0; i < t.first + t.count; ++i) {
      right = right && (i == 0 || row[i] > row[i - 1]) && row[i] < t.tokens && (i >= t.first || row[i] == i);
      if (i < t.first) continue;
      seen[block_of(row[i] - t.first)] = true;
    }
    right = right && std::count(seen.begin(), seen.end(), true) <= num_blocks;
  }
  expect(right, "screened keys, some blocks", level);
  bool refused = false;
  try {
    choose(blocks + 1);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "too many blocks refused", level);
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

}  // namespace
