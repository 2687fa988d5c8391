// Many callers at once: `stress SECONDS` lets 8 threads call every function of the core with mixed shapes, each call
// running several threads inside, and compares every result with the one computed alone beforehand. Results
// must agree to the bit: how work is shared out must not change them. Meant for the sanitizer builds.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/sparsifiner.h"

namespace sp = sparsifiner;

namespace {

using Bytes = std::vector<char>;

// One image's worth of inputs, shared by the calls below and never written again.
struct Inputs {
  sp::AttentionShape s;
  sp::DType dtype;
  sp::Precision precision;
  sp::BlockGrid grid;
  bool masked;
  std::vector<char> qkv;
  std::vector<float> bias, tail_bias, scores, weight;
  std::vector<int32_t> tile_tokens, indices, group_of;
  std::vector<char> tail;

  explicit Inputs(std::mt19937& random) {
    auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    std::normal_distribution<float> normal;
    dtype = pick(0, 1) == 0 ? sp::DType::float32 : sp::DType::bfloat16;
    masked = pick(0, 1) == 1;
    precision = static_cast<sp::Precision>(pick(0, 2));
    grid = {pick(0, 3), pick(1, 14), pick(1, 14), pick(1, 5), pick(1, 5)};
    const int64_t patches = grid.rows * grid.columns;
    s.prefix = grid.prefix;
    s.tokens = grid.prefix + patches;
    s.batch = pick(1, 2);
    s.heads = pick(1, 4);
    s.width = 16 * pick(1, 8);
    s.tile_size = pick(1, 40);
    s.tiles = (patches + s.tile_size - 1) / s.tile_size;
    s.kept = pick(1, s.tokens);
    s.pooled = grid.blocks();
    auto rows = [&](int64_t count) {
      std::vector<char> bytes(static_cast<std::size_t>(count * element()));
      for (int64_t i = 0; i < count; ++i) {
        const float x = normal(random);
        // The upper half of a float32 is a bfloat16.
        std::memcpy(bytes.data() + i * element(), reinterpret_cast<const char*>(&x) + 4 - element(), element());
      }
      return bytes;
    };
    auto floats = [&](int64_t count) {
      std::vector<float> values(static_cast<std::size_t>(count));
      for (float& x : values) x = normal(random);
      return values;
    };
    const int64_t lists = s.batch * s.heads * s.tiles;
    qkv = rows(s.batch * s.tokens * 3 * s.heads * s.width);
    tail = rows(2 * s.batch * s.heads * s.pooled * s.width);
    tail_bias = floats(lists * s.pooled);
    bias = floats(lists * s.kept);
    for (float& x : bias)
      if (x > 0.5f) x = -INFINITY;
    weight = floats(s.batch * s.heads * patches);
    scores = floats(lists * s.tokens);
    indices.resize(static_cast<std::size_t>(lists * s.kept));
    for (int32_t& index : indices) index = static_cast<int32_t>(pick(0, s.tokens - 1));
    tile_tokens.assign(static_cast<std::size_t>(s.tiles * s.tile_size), -1);
    for (int64_t i = 0; i < patches; ++i) tile_tokens[i] = static_cast<int32_t>(s.prefix + i);
    for (int64_t i = 0; i < s.tile_size; ++i) group_of.push_back(static_cast<int32_t>(i % groups()));
  }

  int64_t element() const { return dtype == sp::DType::float32 ? 4 : 2; }
  int64_t groups() const { return (s.tile_size + 2) / 3; }
  int64_t lists() const { return s.batch * s.heads * s.tiles; }

  sp::Rows part(int64_t number) const {
    const int64_t c = s.heads * s.width;
    return {qkv.data() + element() * number * c, s.tokens * 3 * c, s.width, 3 * c};
  }

  Bytes attend(int threads) const {
    Bytes out(static_cast<std::size_t>(element() * s.batch * s.tokens * s.heads * s.width));
    sp::Attention p;
    p.shape = s;
    p.dtype = dtype;
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    p.q = part(0);
    p.k = part(1);
    p.v = part(2);
    p.tail_k = {tail.data(), s.heads * s.pooled * s.width, s.pooled * s.width, s.width};
    p.tail_v = p.tail_k;
    p.tail_v.data = tail.data() + tail.size() / 2;
    p.tile_tokens = tile_tokens.data();
    p.indices = indices.data();
    p.bias = masked ? bias.data() : nullptr;
    p.tail_bias = tail_bias.data();
    p.out = out.data();
    p.precision = precision;
    sp::attend(p, threads);
    return out;
  }

  Bytes tile_keys(int threads) const {
    sp::TileKeys p;
    p.batch = s.batch;
    p.heads = s.heads;
    p.tokens = s.tokens;
    p.width = s.width;
    p.pooled_queries = s.tokens > 1 ? 2 : 1;  // a tile is two neighbouring tokens
    p.tiles = s.tokens / p.pooled_queries;
    p.first = s.prefix;
    p.count = (s.tokens - s.prefix + 1) / 2;
    p.dtype = dtype;
    p.scale = 0.2f;
    p.sum = masked;
    p.q = part(0);
    p.k = part(1);
    p.log2_weight = masked ? weight.data() : nullptr;
    Bytes out(static_cast<std::size_t>(4 * s.batch * s.heads * p.tiles * (p.first + p.count)));
    p.indices = reinterpret_cast<int32_t*>(out.data());
    sp::tile_keys(p, threads);
    return out;
  }

  Bytes screened_keys(int threads) const {
    sp::ScreenedKeys p{};
    p.grid = {grid.prefix, grid.rows, grid.columns, 2, 2};
    const int64_t empty = 4 * p.grid.blocks() - grid.rows * grid.columns;
    p.num_blocks = std::max((empty + 4) / 4, (p.grid.blocks() + 1) / 2);
    p.tiles = {s.batch, s.heads, s.tokens, s.width, s.tiles, 1, s.prefix, 4 * p.num_blocks - empty,
               dtype,   0.2f,    masked,   part(0), part(1)};
    p.tiles.log2_weight = masked ? weight.data() : nullptr;
    Bytes out(static_cast<std::size_t>(4 * lists() * (s.prefix + p.tiles.count)));
    p.tiles.indices = reinterpret_cast<int32_t*>(out.data());
    sp::screened_keys(p, threads);
    return out;
  }

  Bytes topk(int threads) const {
    const int64_t k = (s.tokens + 2) / 3;
    Bytes out(static_cast<std::size_t>(4 * lists() * k));
    sp::topk(scores.data(), sp::DType::float32, lists(), s.tokens, s.tokens, k, reinterpret_cast<int32_t*>(out.data()),
             k, 0, threads);
    return out;
  }

  Bytes group_queries(int threads) const {
    Bytes out(static_cast<std::size_t>(element() * lists() * groups() * s.width));
    sp::group_queries({s.batch, s.heads, s.tokens, s.width, s.tiles, s.tile_size, groups(), 2, dtype, part(0),
                       tile_tokens.data(), group_of.data(), out.data()},
                      threads);
    return out;
  }

  Bytes pool(int threads) const {
    Bytes out(static_cast<std::size_t>(element() * s.batch * s.heads * s.pooled * s.width));
    sp::pool_blocks(part(1), dtype, s.batch, s.heads, s.width, grid, out.data(), threads);
    return out;
  }

  Bytes log_counts(int threads) const {
    Bytes out(static_cast<std::size_t>(4 * lists() * s.pooled));
    sp::log_counts(indices.data(), masked ? bias.data() : nullptr, lists(), s.kept, grid, nullptr, s.tiles,
                   reinterpret_cast<float*>(out.data()), threads);
    return out;
  }

  Bytes distances(int threads) const {
    Bytes out(static_cast<std::size_t>(4 * s.batch * s.heads * s.tokens));
    sp::block_distances(part(2), dtype, s.batch, s.heads, s.width, grid, reinterpret_cast<float*>(out.data()), threads);
    return out;
  }

  // Groups, means and distances, then the other means and the counts that rest on the groups.
  Bytes patch_groups(int threads) const {
    const int64_t heads = s.batch * s.heads, patches = grid.rows * grid.columns;
    const std::size_t mean = static_cast<std::size_t>(element() * heads * s.pooled * s.width);
    const std::size_t words = static_cast<std::size_t>(heads * (patches + s.tokens) + lists() * s.pooled);
    Bytes out(2 * mean + 4 * words);
    char* at = reinterpret_cast<char*>(out.data());
    int32_t* assignment = reinterpret_cast<int32_t*>(at + 2 * mean);
    float* distance = reinterpret_cast<float*>(assignment + heads * patches);
    sp::group_patches({s.batch, s.heads, s.width, 2, dtype, part(2), grid, assignment, at, distance}, threads);
    sp::pool_groups(part(1), dtype, s.batch, s.heads, s.width, grid, assignment, at + mean, threads);
    sp::log_counts(indices.data(), masked ? bias.data() : nullptr, lists(), s.kept, grid, assignment, s.tiles,
                   distance + heads * s.tokens, threads);
    return out;
  }

  // A bad index deep inside: the other threads of the call must stop, and the caller must be told.
  Bytes refuse(int threads) const {
    Inputs broken = *this;
    broken.indices[broken.indices.size() / 2] = static_cast<int32_t>(s.tokens);
    try {
      broken.attend(threads);
    } catch (const std::exception&) {
      return {1};
    }
    return {0};
  }
};

struct Check {
  const char* name;
  Bytes (Inputs::*run)(int threads) const;
};

constexpr Check checks[] = {{"attend", &Inputs::attend},
                            {"tile_keys", &Inputs::tile_keys},
                            {"screened_keys", &Inputs::screened_keys},
                            {"topk", &Inputs::topk},
                            {"group_queries", &Inputs::group_queries},
                            {"pool_blocks", &Inputs::pool},
                            {"log_counts", &Inputs::log_counts},
                            {"distances", &Inputs::distances},
                            {"patch_groups", &Inputs::patch_groups},
                            {"refusal", &Inputs::refuse}};
constexpr std::size_t kChecks = sizeof checks / sizeof checks[0];

// Returns the number of calls made, or -1 if any result differed.
long stress(const char* level, double seconds) {
  sp::force_level(level);
  std::mt19937 random(11);
  std::vector<Inputs> inputs;
  for (int i = 0; i < 24; ++i) inputs.emplace_back(random);
  std::vector<Bytes> expected;
  for (const Inputs& input : inputs)
    for (const Check& check : checks) expected.push_back((input.*check.run)(1));
  std::atomic<long> calls{0}, failures{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 8; ++caller)
    callers.emplace_back([&, caller] {
      std::mt19937 choose(caller);
      do {
        const std::size_t number = choose() % expected.size();
        const Check& check = checks[number % kChecks];
        const int threads = 1 + static_cast<int>(choose() % 4);
        ++calls;
        if ((inputs[number / kChecks].*check.run)(threads) != expected[number] && failures++ == 0)
          std::fprintf(stderr, "FAILED at level %s: %s with %d threads differs from the call made alone\n", level,
                       check.name, threads);
      } while (failures == 0 && std::chrono::steady_clock::now() < end);
    });
  for (std::thread& caller : callers) caller.join();
  return failures == 0 ? calls.load() : -1;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 3.0;
  std::vector<std::string> levels{"amx_emulated"};
  for (sp::Level level : sp::available_levels()) levels.push_back(sp::level_name(level));
  for (const std::string& level : levels) {
    const long calls = stress(level.c_str(), seconds / static_cast<double>(levels.size()));
    if (calls < 0) return 1;
    std::printf("%-13s %ld calls from 8 threads, all as when called alone\n", level.c_str(), calls);
  }
  return 0;
}
