// Tests of the core without Python, meant for the sanitizer builds: every level against plain loops in
// double precision, and refusals. stress.cpp has the many threads.
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/selection_tests.h"

namespace {

void expect_attention(const Case& c, const char* level) {
  const std::size_t size = c.s.batch * c.s.tokens * c.s.heads * c.s.width;
  std::vector<float> out(c.half ? 0 : size);
  std::vector<uint16_t> out16(c.half ? size : 0);
  sp::attend(c.problem(c.half ? static_cast<void*>(out16.data()) : out.data()), 2);
  for (uint16_t x : out16) out.push_back(widen(x));
  // Values of size 4 rounded to 8 bits, the weights likewise; float32 carries 24.
  expect(c.error(out) < (c.half ? 4 * 0.0078125 : 1e-5), c.half ? "bfloat16 attention" : "float32 attention", level);
}

void test_attention(std::mt19937& random, const char* level) {
  for (bool half : {false, true}) expect_attention(Case(random, half), level);
}

// Logits of rounded products: each factor is off by half a step, uniformly and independently of the rest, so the error
// of a sum is a few standard deviations (six). It is a factor of the weights. The weights and values of bfloat16 are
// rounded too. Where an instruction set rounds nothing, the result must be that of float32 to the bit.
void test_rounded_attention(std::mt19937& random, const char* level) {
  const Case c(random, false);
  const std::size_t size = c.s.batch * c.s.tokens * c.s.heads * c.s.width;
  std::vector<float> exact(size), out(size);
  sp::Attention problem = c.problem(exact.data());
  sp::attend(problem, 2);
  const std::vector<sp::Precision> rounding = sp::available_precisions();
  float largest = 0.0f;
  for (float x : c.qkv) largest = std::max(largest, std::fabs(x));
  for (float x : c.tail) largest = std::max(largest, std::fabs(x));
  for (const sp::Precision precision : {sp::Precision::bfloat16, sp::Precision::int8}) {
    problem.precision = precision;
    problem.out = out.data();
    sp::attend(problem, 2);
    if (std::find(rounding.begin(), rounding.end(), precision) == rounding.end()) {
      expect(out == exact, "attention that is not rounded", level);
      continue;
    }
    const bool int8 = precision == sp::Precision::int8;
    // The offset taken off the keys is no larger than a key.
    const double step = int8 ? 2 * largest / 127.0 : largest * 0.0078125;
    const double logit = 6 * 2 * step / std::sqrt(12.0);  // of sqrt(D) * size 1, scaled by D^-1/2
    const double budget = 2 * (std::exp(logit) - 1 + (int8 ? 0 : 0.0078125)) * largest;
    expect(c.error(out) < budget, int8 ? "attention with int8 products" : "attention with bfloat16 products", level);
    double worst = 0;
    for (std::size_t i = 0; i < size; ++i) worst = std::max<double>(worst, std::fabs(out[i] - exact[i]));
    expect(c.s.tokens < 20 || worst > 0, "products are rounded", level);
  }
}

// Keys and values of 2 x 3 heads that are copied two heads at a time, across the border of the images.
void test_attention_in_parts(std::mt19937& random, const char* level) {
  const int64_t tokens = 6001, tile = 64;
  expect_attention(Case(random, false, {2, 3, tokens, 128, (tokens - 1 + tile - 1) / tile, tile, 5, 3, 1}), level);
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

void test_pooling(std::mt19937& random, const char* level) {
  auto pick = [&](int64_t high) { return std::uniform_int_distribution<int64_t>(1, high)(random); };
  sp::BlockGrid grid{pick(3) - 1, pick(9), pick(9), 1, 1};
  grid.block_rows = pick(grid.rows);
  grid.block_columns = pick(grid.columns);
  const int64_t tokens = grid.prefix + grid.rows * grid.columns, width = 16 * pick(3);
  std::vector<float> x(tokens * width), out(grid.blocks() * width);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  sp::pool_blocks({x.data(), tokens * width, tokens * width, width}, sp::DType::float32, 1, 1, width, grid, out.data(),
                  2);
  std::vector<double> sum(out.size());
  std::vector<int> size(grid.blocks());
  std::vector<int32_t> kept;
  std::vector<int> left(grid.blocks());
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t c = 0; c < grid.columns; ++c) {
      const int64_t block = y / grid.block_rows * grid.horizontal() + c / grid.block_columns;
      const int64_t token = grid.prefix + y * grid.columns + c;
      ++size[block];
      if (random() % 2)
        kept.push_back(static_cast<int32_t>(token));
      else
        ++left[block];
      for (int64_t d = 0; d < width; ++d) sum[block * width + d] += x[token * width + d];
    }
  bool close = true;
  for (std::size_t i = 0; i < out.size(); ++i) close = close && std::fabs(out[i] - sum[i] / size[i / width]) < 1e-5;
  expect(close, "pooling", level);
  std::vector<float> counts(grid.blocks());
  sp::log_counts(kept.data(), nullptr, 1, static_cast<int64_t>(kept.size()), grid, nullptr, 1, counts.data(), 2);
  bool exact = true;
  for (std::size_t b = 0; b < counts.size(); ++b) exact = exact && counts[b] == std::log(static_cast<float>(left[b]));
  expect(exact, "log-counts", level);
}

// Every patch must be in a group around its block whose mean is as near as any there, and means, distances and counts
// must be those of the groups: Lloyd's algorithm by plain loops in double precision, from groups of the step before.
void test_patch_groups(std::mt19937& random, const char* level, bool half) {
  auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  sp::BlockGrid grid{pick(0, 2), pick(1, 13), pick(1, 13), 1, 1};
  grid.block_rows = pick(1, grid.rows);
  grid.block_columns = pick(1, grid.columns);
  const int64_t heads = pick(1, 3), width = 16 * pick(1, 8), patches = grid.rows * grid.columns,
                tokens = grid.prefix + patches;
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x16(tokens * heads * width);
  std::vector<float> x;
  for (uint16_t& value : x16) value = narrow(normal(random)), x.push_back(widen(value));
  const sp::Rows rows{half ? static_cast<const void*>(x16.data()) : x.data(), tokens * heads * width, width,
                      heads * width};
  const sp::DType dtype = half ? sp::DType::bfloat16 : sp::DType::float32;
  const auto row = [&](int64_t head, int64_t token) { return x.data() + (token * heads + head) * width; };
  std::vector<int32_t> assignment(heads * patches), before;
  std::vector<float> mean(heads * grid.blocks() * width), distance(heads * tokens);
  std::vector<uint16_t> mean16(half ? mean.size() : 0);
  std::vector<double> centroid(mean.size());
  std::vector<int> size(heads * grid.blocks());
  const auto take_means = [&] {
    std::vector<double> sum(mean.size());
    std::fill(size.begin(), size.end(), 0);
    for (int64_t i = 0; i < heads * patches; ++i) {
      const int64_t group = i / patches * grid.blocks() + assignment[i];
      ++size[group];
      for (int64_t d = 0; d < width; ++d) sum[group * width + d] += row(i / patches, grid.prefix + i % patches)[d];
    }
    for (std::size_t i = 0; i < sum.size(); ++i)
      if (size[i / width] > 0) centroid[i] = sum[i] / size[i / width];
  };
  bool near = true;
  for (int64_t steps = 0; steps < 3; ++steps) {
    sp::group_patches({1, heads, width, steps, dtype, rows, grid, assignment.data(),
                       half ? static_cast<void*>(mean16.data()) : mean.data(), distance.data()},
                      2);
    for (int64_t i = 0; i < heads * patches; ++i) {
      const int64_t head = i / patches, patch = i % patches;
      const int64_t by = patch / grid.columns / grid.block_rows, bx = patch % grid.columns / grid.block_columns;
      const auto square = [&](int64_t group) {
        double total = 0;
        for (int64_t d = 0; d < width; ++d) {
          const double difference =
              row(head, grid.prefix + patch)[d] - centroid[(head * grid.blocks() + group) * width + d];
          total += difference * difference;
        }
        return total;
      };
      if (steps == 0) {
        near = near && assignment[i] == by * grid.horizontal() + bx;
        continue;
      }
      double least = INFINITY;
      for (int64_t y = std::max<int64_t>(0, by - 1); y <= std::min(grid.vertical() - 1, by + 1); ++y)
        for (int64_t z = std::max<int64_t>(0, bx - 1); z <= std::min(grid.horizontal() - 1, bx + 1); ++z)
          least = std::min(least, square(y * grid.horizontal() + z));
      const int64_t away_y = std::abs(assignment[i] / grid.horizontal() - by),
                    away_x = std::abs(assignment[i] % grid.horizontal() - bx);
      near = near && away_y <= 1 && away_x <= 1 && square(assignment[i]) <= least + 1e-3;
    }
    take_means();
  }
  expect(near, "patches join the nearest group", level);
  bool close = true;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    const double got = half ? widen(mean16[i]) : mean[i];
    close = close && std::fabs(got - centroid[i]) < (half ? 0.02 : 1e-5);
  }
  for (int64_t i = 0; i < heads * tokens; ++i) {
    const int64_t head = i / tokens, patch = i % tokens - grid.prefix;
    double total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double from =
          patch < 0 ? 0 : centroid[(head * grid.blocks() + assignment[head * patches + patch]) * width + d];
      total += (row(head, i % tokens)[d] - from) * (row(head, i % tokens)[d] - from);
    }
    close = close && std::fabs(distance[i] - std::sqrt(total)) < 1e-3;
  }
  std::vector<float> again(mean.size());
  std::vector<uint16_t> again16(mean16.size());
  sp::pool_groups(rows, dtype, 1, heads, width, grid, assignment.data(),
                  half ? static_cast<void*>(again16.data()) : again.data(), 2);
  for (std::size_t i = 0; i < mean.size(); ++i) {
    const double want = size[i / width] > 0 ? centroid[i] : 0;
    close = close && std::fabs((half ? widen(again16[i]) : again[i]) - want) < (half ? 0.02 : 1e-5);
  }
  expect(close, "means of groups and distances from them", level);
  std::vector<int32_t> kept(heads);  // of each head one list with one key
  for (int64_t head = 0; head < heads; ++head) kept[head] = static_cast<int32_t>(pick(0, tokens - 1));
  std::vector<float> counts(heads * grid.blocks());
  sp::log_counts(kept.data(), nullptr, heads, 1, grid, assignment.data(), 1, counts.data(), 2);
  bool exact = true;
  for (int64_t i = 0; i < heads * grid.blocks(); ++i) {
    const int64_t head = i / grid.blocks(), patch = kept[head] - grid.prefix;
    const bool lost = patch >= 0 && assignment[head * patches + patch] == i % grid.blocks();
    exact = exact && counts[i] == std::log(static_cast<float>(size[i] - lost));
  }
  expect(exact, "log-counts of groups", level);
}

}  // namespace

int main() {
  std::vector<std::string> levels{"amx_emulated"};
  for (sp::Level level : sp::available_levels()) levels.push_back(sp::level_name(level));
  for (const std::string& level : levels) {
    const char* name = level.c_str();
    sp::force_level(name);
    std::mt19937 random(7);
    test_attention_in_parts(random, name);
    for (int i = 0; i < 40; ++i) {
      test_attention(random, name);
      test_rounded_attention(random, name);
      test_bad_indices(random, name);
      test_topk(random, name);
      test_tile_keys(random, name, i % 2 == 1);
      test_screened_keys(random, name, i % 2 == 1);
      test_tile_groups(random, name);
      test_pooling(random, name);
      test_patch_groups(random, name, i % 2 == 1);
    }
  }
  if (failures == 0) std::printf("all core tests passed\n");
  return failures == 0 ? 0 : 1;
}
