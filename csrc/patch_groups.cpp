// Groups of patches with like rows, and means over them.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "inputs.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace sparsifiner {
namespace {

struct Input {
  const Rows& x;
  DType dtype;
  int64_t batch, heads, width;
  const BlockGrid& grid;

  const char* row(int64_t b, int64_t head, int64_t token) const {
    const int64_t offset = b * x.batch_stride + head * x.head_stride + token * x.token_stride;
    return static_cast<const char*>(x.data) + element_size(dtype) * offset;
  }
  int64_t patches() const { return grid.rows * grid.columns; }
};

// Calls store(row of [B, H, P], sum[width], count) for every group. A band of blocks at a time: its groups have their
// patches there and in the bands beside it.
template <class Store>
void sum_groups(const Input& in, const int32_t* member, int threads, Store&& store) {
  const Kernels& kernel = kernels();
  const BlockGrid& grid = in.grid;
  const int64_t across = grid.horizontal(), slots = in.heads * across;
  parallel_for(in.batch * grid.vertical(), threads, [&](int64_t item) {
    const int64_t b = item / grid.vertical(), band = item % grid.vertical();
    const std::size_t words = static_cast<std::size_t>(slots * in.width);
    float* sum = static_cast<float*>(scratch((words + static_cast<std::size_t>(slots)) * sizeof(float)));
    int32_t* count = reinterpret_cast<int32_t*>(sum + words);
    std::fill_n(sum, words, 0.0f);
    std::fill_n(count, slots, 0);
    const int64_t top = std::max<int64_t>(0, (band - 1) * grid.block_rows) * grid.columns;
    const int64_t bottom = std::min(grid.rows, (band + 2) * grid.block_rows) * grid.columns;
    // Heads of a token are neighbours in memory, so they come last.
    for (int64_t patch = top; patch < bottom; ++patch)
      for (int64_t head = 0; head < in.heads; ++head) {
        const int64_t place = member[(b * in.heads + head) * in.patches() + patch] - band * across;
        if (place < 0 || place >= across) continue;
        const int64_t slot = head * across + place;
        kernel.add_rows(in.row(b, head, grid.prefix + patch), in.dtype, 1, 0, in.width, sum + slot * in.width);
        ++count[slot];
      }
    for (int64_t head = 0; head < in.heads; ++head)
      for (int64_t place = 0; place < across; ++place) {
        const int64_t slot = head * across + place;
        store((b * in.heads + head) * grid.blocks() + band * across + place, sum + slot * in.width, count[slot]);
      }
  });
}

// Every patch of one block of one head joins the nearest of the means around.
void join_nearest(const Input& in, int64_t b, int64_t head, int64_t by, int64_t bx, const float* means, int32_t* member) {
  const BlockGrid& grid = in.grid;
  const Kernels& kernel = kernels();
  const int64_t top = by * grid.block_rows, bottom = std::min(grid.rows, top + grid.block_rows);
  const int64_t left = bx * grid.block_columns, right = std::min(grid.columns, left + grid.block_columns);
  thread_local std::vector<const void*> rows;
  thread_local std::vector<int32_t> nearest;
  rows.clear();
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t x = left; x < right; ++x) rows.push_back(in.row(b, head, grid.prefix + y * grid.columns + x));
  nearest.resize(rows.size());
  const float* candidates[9];
  int32_t numbers[9];
  int count = 0;
  for (int64_t y = std::max<int64_t>(0, by - 1); y <= std::min(grid.vertical() - 1, by + 1); ++y)
    for (int64_t x = std::max<int64_t>(0, bx - 1); x <= std::min(grid.horizontal() - 1, bx + 1); ++x) {
      const int64_t number = y * grid.horizontal() + x;
      numbers[count] = static_cast<int32_t>(number);
      candidates[count++] = means + ((b * in.heads + head) * grid.blocks() + number) * in.width;
    }
  const NearestTask task{in.dtype, static_cast<int>(in.width), static_cast<int>(rows.size()), count, rows.data(), candidates,
                         nearest.data()};
  kernel.nearest(task, scratch(kernel.nearest_scratch(task)));
  const int32_t* next = nearest.data();
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t x = left; x < right; ++x) member[y * grid.columns + x] = numbers[*next++];
}

}  // namespace

void group_patches(const PatchGroups& p, int threads) {
  check_width(p.width);
  const Input in{p.x, p.dtype, p.batch, p.heads, p.width, p.grid};
  const Kernels& kernel = kernels();
  const BlockGrid& grid = p.grid;
  const int64_t blocks = grid.blocks(), patches = in.patches(), tokens = grid.prefix + patches;
  const Memory memory = allocate(p.batch * p.heads * blocks * p.width * static_cast<int64_t>(sizeof(float)));
  float* means = reinterpret_cast<float*>(memory.get());
  const std::vector<int32_t> block = block_of_token(grid);
  for (int64_t list = 0; list < p.batch * p.heads; ++list)
    std::copy(block.begin() + grid.prefix, block.end(), p.member + list * patches);
  const auto take_means = [&] {
    sum_groups(in, p.member, threads, [&](int64_t group, const float* sum, int32_t count) {
      if (count > 0) kernel.store_row(sum, 1.0f / static_cast<float>(count), p.width, DType::float32, means + group * p.width);
    });
  };
  take_means();
  for (int64_t step = 0; step < p.steps; ++step) {
    parallel_for(p.batch * grid.vertical() * p.heads, threads, [&](int64_t item) {
      const int64_t head = item % p.heads, by = item / p.heads % grid.vertical(), b = item / p.heads / grid.vertical();
      for (int64_t bx = 0; bx < grid.horizontal(); ++bx)
        join_nearest(in, b, head, by, bx, means, p.member + (b * p.heads + head) * patches);
    });
    take_means();
  }
  const float zero[128] = {};
  parallel_for(p.batch * p.heads, threads, [&](int64_t list) {
    const int64_t b = list / p.heads, head = list % p.heads;
    for (int64_t token = 0; token < tokens; ++token) {
      const bool prefix = token < grid.prefix;
      const float* mean = prefix ? zero : means + (list * blocks + p.member[list * patches + token - grid.prefix]) * p.width;
      kernel.distances(in.row(b, head, token), p.dtype, 1, 0, p.width, mean, p.distance + list * tokens + token);
    }
    for (int64_t group = list * blocks; group < (list + 1) * blocks; ++group)
      kernel.store_row(means + group * p.width, 1.0f, p.width, p.dtype,
                       static_cast<char*>(p.mean) + element_size(p.dtype) * group * p.width);
  });
}

void pool_groups(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                 const int32_t* member, void* out, int threads) {
  check_width(width);
  const Input in{x, dtype, batch, heads, width, grid};
  sum_groups(in, member, threads, [&](int64_t group, const float* sum, int32_t count) {
    kernels().store_row(sum, count > 0 ? 1.0f / static_cast<float>(count) : 0.0f, width, dtype,
                        static_cast<char*>(out) + element_size(dtype) * group * width);
  });
}

}  // namespace sparsifiner
