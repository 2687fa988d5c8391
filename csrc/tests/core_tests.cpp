// Tests of the core without Python, meant for the sanitizer builds: every level against plain loops in
// double precision, and refusals. stress.cpp has the many threads.
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "selection_tests.h"

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
    test_attention_in_parts(random, name);
    for (int i = 0; i < 40; ++i) {
      test_attention(random, name);
      test_bad_indices(random, name);
      test_topk(random, name);
      test_tile_keys(random, name, i % 2 == 1);
      test_screened_keys(random, name, i % 2 == 1);
      test_tile_groups(random, name);
      test_pooling(random, name);
    }
  }
  if (failures == 0) std::printf("all core tests passed\n");
  return failures == 0 ? 0 : 1;
}
