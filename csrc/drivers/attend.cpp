// Splits an attention problem into tiles, each of which a thread hands to the kernel of the active level.
//
// Keys and values are copied first, a few heads at a time: where the model left them, rows of one head lie a multiple
// of 256 bytes apart and evict each other from the first-level cache. Each row is read by many tiles (25 at 4,096
// tokens and keep 0.1), so the copy, a read and a write of each, pays for itself.
#include <algorithm>
#include <cmath>
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
  float* key_scales;
  uint16_t* narrowed;  // [queries][D]
  void* kernel;
};

// Where products are rounded, the copy of keys and values is, and the tail is copied too.
class Driver {
 public:
  explicit Driver(const Attention& problem) : p_(problem), s_(problem.shape), kernels_(kernels()) {
    element_ = static_cast<std::size_t>(element_size(p_.dtype));
    if (p_.dtype == DType::float32) {
      if (p_.precision == Precision::bfloat16 && kernels_.bfloat16_products) precision_ = Precision::bfloat16;
      if (p_.precision == Precision::int8 && kernels_.attend_int8 != nullptr) precision_ = Precision::int8;
    }
    const std::size_t width = static_cast<std::size_t>(s_.width);
    key_bytes_ = precision_ == Precision::int8       ? width
                 : precision_ == Precision::bfloat16 ? 2 * width
                                                     : element_ * width;
    value_bytes_ = precision_ == Precision::bfloat16 ? 2 * width : element_ * width;
    rows_per_head_ = s_.tokens + (precision_ == Precision::same ? 0 : s_.pooled);
  }

  void run(int threads) {
    const int64_t heads = s_.batch * s_.heads;  // of all images
    if (heads == 0) return;
    const bool int8 = precision_ == Precision::int8;
    const int64_t row_bytes = static_cast<int64_t>(key_bytes_ + value_bytes_) + (int8 ? 4 : 0);
    const int64_t head_bytes = rows_per_head_ * row_bytes + (int8 ? 4 * s_.width : 0);
    // As few parts as the memory that is kept anyway allows, of about the same size.
    const int64_t limit = std::max<int64_t>(1, static_cast<int64_t>(kCachedBytes) / std::max<int64_t>(1, head_bytes));
    const int64_t parts = (heads + limit - 1) / limit, heads_per_part = (heads + parts - 1) / parts;
    const SharedBuffer rows = allocate(heads_per_part * head_bytes);
    rows_ = rows.get();
    scales_ = reinterpret_cast<float*>(rows_ + heads_per_part * rows_per_head_ * (key_bytes_ + value_bytes_));
    offsets_ = scales_ + heads_per_part * rows_per_head_;
    for (first_head_ = 0; first_head_ < heads; first_head_ += heads_per_part) {
      const int64_t count = std::min(heads_per_part, heads - first_head_);
      const int64_t blocks = (rows_per_head_ + kCopiedRows - 1) / kCopiedRows;
      if (int8) parallel_for(count, threads, [&](int64_t head) { find_offset(head); });
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

  // The key of a token, or behind those of a pooled one, of a head counted over those that are copied. Its value
  // follows.
  char* copied(int64_t head, int64_t row) const {
    return rows_ + static_cast<std::size_t>(head * rows_per_head_ + row) * (key_bytes_ + value_bytes_);
  }

  // About the mean key of a head: that of some keys, since any vector would do.
  void find_offset(int64_t head) const {
    constexpr int64_t sample = 64;
    const int64_t batch = (first_head_ + head) / s_.heads, of_image = (first_head_ + head) % s_.heads;
    const int64_t step = std::max<int64_t>(1, s_.tokens / sample), count = (s_.tokens + step - 1) / step;
    float* offset = offsets_ + head * s_.width;
    std::fill_n(offset, s_.width, 0.0f);
    for (int64_t token = 0; token < s_.tokens; token += step)
      kernels_.add_rows(row(p_.k, element_, batch, of_image, token), p_.dtype, 1, 0, s_.width, offset);
    for (int64_t d = 0; d < s_.width; ++d) {
      offset[d] /= static_cast<float>(count);
      if (!std::isfinite(offset[d])) offset[d] = 0.0f;  // then the keys with such numbers alone are NaN
    }
  }

  void copy_rows(int64_t head, int64_t first) const {
    const int64_t batch = (first_head_ + head) / s_.heads, of_image = (first_head_ + head) % s_.heads;
    const int width = static_cast<int>(s_.width);
    for (int64_t i = first; i < std::min(rows_per_head_, first + kCopiedRows); ++i) {
      const bool pooled = i >= s_.tokens;
      const int64_t number = pooled ? i - s_.tokens : i;
      const char* k = row(pooled ? p_.tail_k : p_.k, element_, batch, of_image, number);
      const char* v = row(pooled ? p_.tail_v : p_.v, element_, batch, of_image, number);
      char* to = copied(head, i);
      if (precision_ == Precision::bfloat16) {
        kernels_.narrow_row(reinterpret_cast<const float*>(k), reinterpret_cast<uint16_t*>(to), width);
        kernels_.narrow_row(reinterpret_cast<const float*>(v), reinterpret_cast<uint16_t*>(to + key_bytes_), width);
        continue;
      }
      if (precision_ == Precision::int8)
        kernels_.round_key(reinterpret_cast<const float*>(k), offsets_ + head * s_.width, width,
                           reinterpret_cast<uint8_t*>(to), scales_ + head * rows_per_head_ + i);
      else
        std::memcpy(to, k, key_bytes_);
      std::memcpy(to + key_bytes_, v, value_bytes_);
    }
  }

  TileTask task(int64_t queries, int64_t keys) const {
    TileTask task{};
    task.dtype = precision_ == Precision::bfloat16 ? DType::bfloat16 : p_.dtype;
    task.out_dtype = p_.dtype;
    task.width = static_cast<int>(s_.width);
    task.queries = static_cast<int>(queries);
    task.keys = static_cast<int>(keys);
    task.scale = p_.scale;
    return task;
  }

  Lists make_lists(const TileTask& task) const {
    const std::size_t queries = static_cast<std::size_t>(task.queries), keys = static_cast<std::size_t>(task.keys);
    const std::size_t narrowed = precision_ == Precision::bfloat16 ? queries * static_cast<std::size_t>(s_.width) : 0;
    const std::size_t kernel = kernels_.attend_scratch(task);
    const auto place = [&](char* base, Lists* lists) {
      BumpAllocator allocator{base};
      lists->q = allocator.allocate<const void*>(queries);
      lists->out = allocator.allocate<void*>(queries);
      lists->k = allocator.allocate<const void*>(keys);
      lists->v = allocator.allocate<const void*>(keys);
      lists->bias = allocator.allocate<float>(keys);
      lists->key_scales = allocator.allocate<float>(precision_ == Precision::int8 ? keys : 0);
      lists->narrowed = allocator.allocate<uint16_t>(narrowed);
      lists->kernel = allocator.allocate<char>(kernel);
      return allocator.used;
    };
    Lists lists;
    place(static_cast<char*>(scratch(place(nullptr, &lists))), &lists);
    return lists;
  }

  void* output(int64_t batch, int64_t head, int64_t token) const {
    const int64_t offset = ((batch * s_.tokens + token) * s_.heads + head) * s_.width;
    return static_cast<char*>(p_.out) + element_ * static_cast<std::size_t>(offset);
  }

  // The next query of a task.
  void add_query(TileTask& task, const Lists& lists, int64_t batch, int64_t head, int64_t token) const {
    const char* query = row(p_.q, element_, batch, head, token);
    if (precision_ == Precision::bfloat16) {
      uint16_t* narrowed = lists.narrowed + task.queries * s_.width;
      kernels_.narrow_row(reinterpret_cast<const float*>(query), narrowed, static_cast<int>(s_.width));
      query = reinterpret_cast<const char*>(narrowed);
    }
    lists.q[task.queries] = query;
    lists.out[task.queries++] = output(batch, head, token);
  }

  // The next key of a task: a row of those copied. `head` counts over those that are.
  void add_copied(TileTask& task, const Lists& lists, int64_t head, int64_t row) const {
    const char* k = copied(head, row);
    lists.k[task.keys] = k;
    lists.v[task.keys] = k + key_bytes_;
    if (precision_ == Precision::int8) lists.key_scales[task.keys] = scales_[head * rows_per_head_ + row];
    ++task.keys;
  }

  void finish(TileTask& task, const Lists& lists, bool has_bias) const {
    task.q = lists.q;
    task.k = lists.k;
    task.v = lists.v;
    task.out = lists.out;
    task.bias = has_bias ? lists.bias : nullptr;
    task.key_scales = lists.key_scales;
    (precision_ == Precision::int8 ? kernels_.attend_int8 : kernels_.attend)(task, lists.kernel);
  }

  void prefix(int64_t item) const {
    const int64_t batch = item / s_.heads, head = item % s_.heads;
    TileTask t = task(s_.prefix, s_.tokens);
    const Lists lists = make_lists(t);
    t.queries = t.keys = 0;
    for (int64_t i = 0; i < s_.prefix; ++i) add_query(t, lists, batch, head, i);
    for (int64_t i = 0; i < s_.tokens; ++i) add_copied(t, lists, item - first_head_, i);
    finish(t, lists, false);
  }

  void tile(int64_t index) const {
    const int64_t tile = index % s_.tiles, head = index / s_.tiles % s_.heads, batch = index / s_.tiles / s_.heads;
    TileTask t = task(s_.tile_size, s_.kept + s_.pooled);
    const Lists lists = make_lists(t);
    t.queries = t.keys = 0;
    const int32_t* tokens = p_.tile_tokens + tile * s_.tile_size;
    for (int64_t i = 0; i < s_.tile_size; ++i)
      if (tokens[i] >= 0) add_query(t, lists, batch, head, tokens[i]);
    const int64_t copied_head = batch * s_.heads + head - first_head_;
    const int32_t* indices = p_.indices + index * s_.kept;
    const float* bias = p_.bias != nullptr ? p_.bias + index * s_.kept : nullptr;
    const float* tail_bias = p_.tail_bias != nullptr ? p_.tail_bias + index * s_.pooled : nullptr;
    const uint32_t limit = static_cast<uint32_t>(s_.tokens);
    for (int64_t i = 0; i < s_.kept; ++i) {
      if (static_cast<uint32_t>(indices[i]) >= limit) throw_bad_index(indices[i], s_.tokens);
      lists.bias[t.keys] = bias != nullptr ? bias[i] : 0.0f;
      if (bias == nullptr || bias[i] != -std::numeric_limits<float>::infinity())
        add_copied(t, lists, copied_head, indices[i]);
    }
    for (int64_t i = 0; i < s_.pooled; ++i) {
      if (tail_bias != nullptr && tail_bias[i] == -std::numeric_limits<float>::infinity()) continue;
      lists.bias[t.keys] = tail_bias != nullptr ? tail_bias[i] : 0.0f;
      if (precision_ != Precision::same) {
        add_copied(t, lists, copied_head, s_.tokens + i);
        continue;
      }
      lists.k[t.keys] = row(p_.tail_k, element_, batch, head, i);
      lists.v[t.keys++] = row(p_.tail_v, element_, batch, head, i);
    }
    finish(t, lists, bias != nullptr || tail_bias != nullptr);
  }

  const Attention& p_;
  const AttentionShape& s_;
  const Kernels& kernels_;
  Precision precision_ = Precision::same;
  std::size_t element_, key_bytes_, value_bytes_;
  int64_t rows_per_head_;
  char* rows_ = nullptr;      // [heads that are copied][rows_per_head_][key, value]
  float* scales_ = nullptr;   // [heads that are copied][rows_per_head_], of int8 keys
  float* offsets_ = nullptr;  // [heads that are copied][D], taken off int8 keys
  int64_t first_head_ = 0;    // the first of them, counted over all images
};

}  // namespace

void attend(const Attention& problem, int threads) {
  check(problem);
  Driver(problem).run(threads);
}

}  // namespace sparsifiner
