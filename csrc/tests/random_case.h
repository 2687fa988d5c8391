// Random inputs of the core's tests, and how a test fails.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/sparsifiner.h"

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

  static sp::AttentionShape small_shape(std::mt19937& random) {
    auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    sp::AttentionShape s;
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
    return s;
  }

  Case(std::mt19937& random, bool half_) : Case(random, half_, small_shape(random)) {}

  Case(std::mt19937& random, bool half_, const sp::AttentionShape& shape) : s(shape), half(half_) {
    auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
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
    for (int64_t i = 0; i < s.tokens - s.prefix; ++i) tile_tokens[i] = static_cast<int32_t>(s.prefix + i);
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
    const char* pooled =
        half ? reinterpret_cast<const char*>(tail16.data()) : reinterpret_cast<const char*>(tail.data());
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

}  // namespace
