// Splits an attention problem into tiles, each of which a thread hands to the kernel of the active level.
//
// Keys and values are copied first, a few heads at a time: where the model left them, rows of one head lie a multiple
// of 256 bytes apart and evict each other from the first-level cache. Each row is read by many tiles (25 at 4,096
// tokens and keep 0.1), so the copy, a read and a write of each, pays for itself.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/bump_allocator.h"
#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/shared_buffer.h"
#include "core/sparsifiner.h"

namespace sparsifiner {
namespace {

void check(const Attention& p) {
  const AttentionShape& s = p.shape;
  check_width(s.width);
  if (s.tokens > std::numeric_limits<int32_t>::max() || s.prefix > s.tokens)
    throw std::invalid_argument("too many tokens, or more prefix tokens than tokens");
  for (int64_t i = 0; i < s.tiles * s.tile_size; ++i)
    if (p.tile_tokens[i] >= s.tokens)
      throw std::out_of_range("tile_tokens holds " + std::to_string(p.tile_tokens[i]) + ", but there are only " +
                              std::to_string(s.tokens) + " tokens");
}

[[noreturn]] void throw_bad_index(int32_t index, int64_t tokens) {
  throw std::out_of_range("connectivity.indices must lie in [0, " + std::to_string(tokens) +
                          "), the number of keys, got " + std::to_string(index));
}

const char* row(const Rows& rows, std::size_t element, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const char*>(rows.data) +
         element *
             static_cast<std::size_t>(batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride);
}

struct Lists {
  const void** q;
  void** out;
  const void** k;
  const void** v;
  float* bias;
  void* kernel;
};

Lists make_lists(std::size_t queries, std::size_t keys, std::size_t kernel_bytes) {
  const std::size_t bytes = (2 * queries + 2 * keys) * sizeof(void*) + keys * sizeof(float) + kernel_bytes + 6 * 64;
  BumpAllocator allocator{static_cast<char*>(scratch(bytes))};
  Lists lists;
  lists.q = allocator.allocate<const void*>(queries);
  lists.out = allocator.allocate<void*>(queries);
  lists.k = allocator.allocate<const void*>(keys);
  lists.v = allocator.allocate<const void*>(keys);
  lists.bias = allocator.allocate<float>(keys);
  lists.kernel = allocator.allocate<char>(kernel_bytes);
  return lists;
}

class Driver {
 public:
  explicit Driver(const Attention& problem) : p_(problem), s_(problem.shape), kernels_(kernels()) {
    element_ = static_cast<std::size_t>(element_size(p_.dtype));
    row_bytes_ = element_ * static_cast<std::size_t>(s_.width);
  }

  void run(int threads) {
    const int64_t heads = s_.batch * s_.heads;  // of all images
    if (heads == 0) return;
    const int64_t head_bytes = s_.tokens * 2 * static_cast<int64_t>(row_bytes_);
    // As few parts as the memory that is kept anyway allows, of about the same size.
    const int64_t limit = std::max<int64_t>(1, static_cast<int64_t>(kCachedBytes) / std::max<int64_t>(1, head_bytes));
    const int64_t parts = (heads + limit - 1) / limit, heads_per_part = (heads + parts - 1) / parts;
    const SharedBuffer rows = allocate(heads_per_part * head_bytes);
    rows_ = rows.get();
    for (first_head_ = 0; first_head_ < heads; first_head_ += heads_per_part) {
      const int64_t count = std::min(heads_per_part, heads - first_head_),
                    blocks = (s_.tokens + kCopiedRows - 1) / kCopiedRows;
      parallel_for(count * blocks, threads,
                   [&](int64_t item) { copy_rows(item / blocks, item % blocks * kCopiedRows); });
      // The dense rows of the prefix tokens are the largest items, so they are handed out first.
      const int64_t dense = s_.prefix > 0 ? count : 0;
      parallel_for(dense + count * s_.tiles, threads, [&](int64_t item) {
        if (item < dense)
          prefix(first_head_ + item);
        else
          tile(first_head_ * s_.tiles + item - dense);
      });
    }
  }

 private:
  static constexpr int64_t kCopiedRows = 128;

  // The key of a token, counted over the heads that are copied; its value follows.
  char* copied(int64_t head, int64_t token) const {
    return rows_ + static_cast<std::size_t>(head * s_.tokens + token) * 2 * row_bytes_;
  }

  void copy_rows(int64_t head, int64_t first) const {
    const int64_t batch = (first_head_ + head) / s_.heads, of_image = (first_head_ + head) % s_.heads;
    for (int64_t token = first; token < std::min(s_.tokens, first + kCopiedRows); ++token) {
      std::memcpy(copied(head, token), row(p_.k, element_, batch, of_image, token), row_bytes_);
      std::memcpy(copied(head, token) + row_bytes_, row(p_.v, element_, batch, of_image, token), row_bytes_);
    }
  }

  TileTask task(int64_t queries, int64_t keys) const {
    TileTask task;
    task.dtype = p_.dtype;
    task.width = static_cast<int>(s_.width);
    task.queries = static_cast<int>(queries);
    task.keys = static_cast<int>(keys);
    task.scale = p_.scale;
    return task;
  }

  void* output(int64_t batch, int64_t head, int64_t token) const {
    const int64_t offset = ((batch * s_.tokens + token) * s_.heads + head) * s_.width;
    return static_cast<char*>(p_.out) + element_ * static_cast<std::size_t>(offset);
  }

  void finish(TileTask& task, const Lists& lists, bool has_bias) const {
    task.q = lists.q;
    task.k = lists.k;
    task.v = lists.v;
    task.out = lists.out;
    task.bias = has_bias ? lists.bias : nullptr;
    kernels_.attend(task, lists.kernel);
  }

  void prefix(int64_t item) const {
    const int64_t batch = item / s_.heads, head = item % s_.heads;
    TileTask t = task(s_.prefix, s_.tokens);
    const Lists lists = make_lists(s_.prefix, s_.tokens, kernels_.attend_scratch(t));
    for (int64_t i = 0; i < s_.prefix; ++i) {
      lists.q[i] = row(p_.q, element_, batch, head, i);
      lists.out[i] = output(batch, head, i);
    }
    for (int64_t i = 0; i < s_.tokens; ++i) {
      lists.k[i] = copied(item - first_head_, i);
      lists.v[i] = copied(item - first_head_, i) + row_bytes_;
    }
    finish(t, lists, false);
  }

  void tile(int64_t index) const {
    const int64_t tile = index % s_.tiles, head = index / s_.tiles % s_.heads, batch = index / s_.tiles / s_.heads;
    const int64_t keys = s_.kept + s_.pooled;
    TileTask t = task(s_.tile_size, keys);
    const Lists lists = make_lists(s_.tile_size, keys, kernels_.attend_scratch(t));
    const int32_t* tokens = p_.tile_tokens + tile * s_.tile_size;
    t.queries = 0;
    for (int64_t i = 0; i < s_.tile_size; ++i) {
      if (tokens[i] < 0) continue;
      lists.q[t.queries] = row(p_.q, element_, batch, head, tokens[i]);
      lists.out[t.queries++] = output(batch, head, tokens[i]);
    }
    const int32_t* indices = p_.indices + index * s_.kept;
    const uint32_t limit = static_cast<uint32_t>(s_.tokens);
    const char* k = copied(batch * s_.heads + head - first_head_, 0);
    for (int64_t i = 0; i < s_.kept; ++i) {
      if (static_cast<uint32_t>(indices[i]) >= limit) throw_bad_index(indices[i], s_.tokens);
      lists.k[i] = k + static_cast<std::size_t>(indices[i]) * 2 * row_bytes_;
      lists.v[i] = k + (static_cast<std::size_t>(indices[i]) * 2 + 1) * row_bytes_;
    }
    for (int64_t i = 0; i < s_.pooled; ++i) {
      lists.k[s_.kept + i] = row(p_.tail_k, element_, batch, head, i);
      lists.v[s_.kept + i] = row(p_.tail_v, element_, batch, head, i);
    }
    const bool has_bias = p_.bias != nullptr || p_.tail_bias != nullptr;
    if (has_bias) {
      if (p_.bias != nullptr)
        std::memcpy(lists.bias, p_.bias + index * s_.kept, sizeof(float) * s_.kept);
      else
        std::memset(lists.bias, 0, sizeof(float) * s_.kept);
      if (p_.tail_bias != nullptr)
        std::memcpy(lists.bias + s_.kept, p_.tail_bias + index * s_.pooled, sizeof(float) * s_.pooled);
      else
        std::memset(lists.bias + s_.kept, 0, sizeof(float) * s_.pooled);
    }
    finish(t, lists, has_bias);
  }

  const Attention& p_;
  const AttentionShape& s_;
  const Kernels& kernels_;
  std::size_t element_, row_bytes_;
  char* rows_ = nullptr;    // [heads that are copied][N][key, value][D]
  int64_t first_head_ = 0;  // the first of them, counted over all images
};

}  // namespace

void attend(const Attention& problem, int threads) {
  check(problem);
  Driver(problem).run(threads);
}

}  // namespace sparsifiner
