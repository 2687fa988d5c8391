// Groups of patches with like rows, and means over them.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/shared_buffer.h"
#include "core/sparsifiner.h"
#include "drivers/block_grid.h"

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
  // Asks for a row that is read next: rows of many patches are too many streams for the processor to foresee.
  void fetch(const char* row) const {
    for (std::size_t byte = 0; byte < element_size(dtype) * static_cast<std::size_t>(width); byte += 64)
      __builtin_prefetch(row + byte);
  }
};

// Sums and sizes of groups, band of blocks by band. Patches join groups of their own band and of the two beside it, so
// each band has its part of three bands' sums, and threads need not wait for each other.
class PartialSums {
 public:
  // What one band and head add to the groups from the band before it to the band after it.
  struct Part {
    float* sum;      // [3 * blocks of a band][D]
    int32_t* count;  // [3 * blocks of a band]
  };

  explicit PartialSums(const Input& in)
      : in_(in),
        slots_(3 * in.grid.horizontal()),
        parts_(in.batch * in.heads * in.grid.vertical()),
        memory_(allocate(parts_ * slots_ * (in.width + 1) * static_cast<int64_t>(sizeof(float)))) {}

  // Number of the first group in a part of this band; before the first band there are none, and they stay empty.
  int64_t first_group(int64_t band) const { return (band - 1) * in_.grid.horizontal(); }

  Part part(int64_t b, int64_t head, int64_t band) const {
    const int64_t number = (b * in_.heads + head) * in_.grid.vertical() + band;
    float* sums = reinterpret_cast<float*>(memory_.get());
    return {sums + number * slots_ * in_.width,
            reinterpret_cast<int32_t*>(sums + parts_ * slots_ * in_.width) + number * slots_};
  }

  Part empty_part(int64_t b, int64_t head, int64_t band) const {
    const Part part = this->part(b, head, band);
    std::fill_n(part.sum, slots_ * in_.width, 0.0f);
    std::fill_n(part.count, slots_, 0);
    return part;
  }

  // Calls store(row of [B, H, P], sum[D], count) for every group, once all parts are filled.
  template <class Store>
  void add_parts(int threads, Store&& store) const {
    const Kernels& kernel = kernels();
    const int64_t bands = in_.grid.vertical(), across = in_.grid.horizontal();
    parallel_for(in_.batch * in_.heads * bands, threads, [&](int64_t item) {
      const int64_t band = item % bands, list = item / bands;
      for (int64_t column = 0; column < across; ++column) {
        float sum[kMaxWidth] = {};
        int32_t count = 0;
        for (int64_t from = std::max<int64_t>(0, band - 1); from <= std::min(bands - 1, band + 1); ++from) {
          const Part part = this->part(list / in_.heads, list % in_.heads, from);
          const int64_t slot = (band - from + 1) * across + column;
          kernel.add_rows(part.sum + slot * in_.width, DType::float32, 1, 0, in_.width, sum);
          count += part.count[slot];
        }
        store(item * across + column, sum, count);
      }
    });
  }

 private:
  const Input& in_;
  int64_t slots_, parts_;
  SharedBuffer memory_;
};

// Every patch is added to its group.
void add_patches(const Input& in, const int32_t* assignment, const PartialSums& sums, int threads) {
  const Kernels& kernel = kernels();
  const BlockGrid& grid = in.grid;
  parallel_for(in.batch * grid.vertical(), threads, [&](int64_t item) {
    const int64_t b = item / grid.vertical(), band = item % grid.vertical();
    const int64_t first = sums.first_group(band), last = std::min(grid.blocks(), first + 3 * grid.horizontal());
    for (int64_t head = 0; head < in.heads; ++head) sums.empty_part(b, head, band);
    // Heads of a token are neighbours in memory, so they come last.
    for (int64_t patch = band * grid.block_rows * grid.columns; patch < grid.end_of_band(band) * grid.columns; ++patch)
      for (int64_t head = 0; head < in.heads; ++head) {
        in.fetch(in.row(b, head, std::min(grid.prefix + in.patches() - 1, grid.prefix + patch + 2)));
        const int64_t group = assignment[(b * in.heads + head) * in.patches() + patch];
        if (group < std::max<int64_t>(0, first) || group >= last)
          throw std::out_of_range("member: patch " + std::to_string(patch) + " is in group " + std::to_string(group) +
                                  ", which is none of those around its block");
        const PartialSums::Part part = sums.part(b, head, band);
        kernel.add_rows(in.row(b, head, grid.prefix + patch), in.dtype, 1, 0, in.width,
                        part.sum + (group - first) * in.width);
        ++part.count[group - first];
      }
  });
}

struct Means {
  float* mean;         // [B, H, P, D]
  float* half_square;  // [B, H, P]
};

// Rows of patches block by block, those of a head together: where the model left them, each lies on a page of its own.
class BlockRows {
 public:
  explicit BlockRows(const Input& in)
      : in_(in),
        row_bytes_(element_size(in.dtype) * in.width),
        memory_(allocate(in.batch * in.heads * in.patches() * row_bytes_)) {}

  int64_t count(int64_t by, int64_t bx) const {
    const BlockGrid& grid = in_.grid;
    const int64_t left = bx * grid.block_columns;
    return height(by) * (std::min(grid.columns, left + grid.block_columns) - left);
  }

  // Row `i` of a block, counted row by row of the grid.
  char* row(int64_t b, int64_t head, int64_t by, int64_t bx, int64_t i) const {
    const BlockGrid& grid = in_.grid;
    const int64_t before = by * grid.block_rows * grid.columns + height(by) * bx * grid.block_columns;
    return memory_.get() + ((b * in_.patches() + before) * in_.heads + head * count(by, bx) + i) * row_bytes_;
  }

  void copy_band(int64_t b, int64_t by) const {
    const BlockGrid& grid = in_.grid;
    const int64_t last = grid.prefix + in_.patches() - 1;
    for (int64_t y = 0; y < height(by); ++y)
      for (int64_t x = 0; x < grid.columns; ++x) {
        const int64_t token = grid.prefix + (by * grid.block_rows + y) * grid.columns + x;
        const int64_t bx = x / grid.block_columns, left = bx * grid.block_columns;
        const int64_t breadth = std::min(grid.columns, left + grid.block_columns) - left;
        for (int64_t head = 0; head < in_.heads; ++head) {
          in_.fetch(in_.row(b, head, std::min(last, token + 2)));
          std::memcpy(row(b, head, by, bx, y * breadth + x - left), in_.row(b, head, token),
                      static_cast<std::size_t>(row_bytes_));
        }
      }
  }

 private:
  int64_t height(int64_t by) const { return in_.grid.end_of_band(by) - by * in_.grid.block_rows; }

  const Input& in_;
  int64_t row_bytes_;
  SharedBuffer memory_;
};

void set_mean(const Means& means, int64_t group, const float* sum, int64_t count, int64_t width) {
  if (count == 0) return;
  float* mean = means.mean + group * width;
  kernels().store_row(sum, 1.0f / static_cast<float>(count), width, DType::float32, mean);
  means.half_square[group] = kernels().half_square(mean, static_cast<int>(width));
}

// Every patch of one block of one head joins the nearest of the means around, and is added to its next one.
void join_nearest(const Input& in, const BlockRows& from, int64_t b, int64_t head, int64_t by, int64_t bx,
                  const Means& means, const PartialSums& sums, int32_t* assignment) {
  const BlockGrid& grid = in.grid;
  const Kernels& kernel = kernels();
  const int64_t left = bx * grid.block_columns, right = std::min(grid.columns, left + grid.block_columns);
  thread_local std::vector<const void*> rows;
  thread_local std::vector<int32_t> nearest;
  const std::size_t size = static_cast<std::size_t>(from.count(by, bx));
  rows.resize(size);
  nearest.resize(size);
  for (std::size_t i = 0; i < size; ++i) rows[i] = from.row(b, head, by, bx, static_cast<int64_t>(i));
  const PartialSums::Part part = sums.part(b, head, by);
  const float* candidates[9];
  float half_squares[9];
  float* next_sums[9];
  int64_t numbers[9];
  int count = 0;
  for (int64_t y = std::max<int64_t>(0, by - 1); y <= std::min(grid.vertical() - 1, by + 1); ++y)
    for (int64_t x = std::max<int64_t>(0, bx - 1); x <= std::min(grid.horizontal() - 1, bx + 1); ++x) {
      const int64_t number = y * grid.horizontal() + x, row = (b * in.heads + head) * grid.blocks() + number;
      numbers[count] = number;
      half_squares[count] = means.half_square[row];
      next_sums[count] = part.sum + (number - sums.first_group(by)) * in.width;
      candidates[count++] = means.mean + row * in.width;
    }
  const NearestTask task{in.dtype,
                         static_cast<int>(in.width),
                         static_cast<int>(rows.size()),
                         count,
                         rows.data(),
                         candidates,
                         half_squares,
                         next_sums,
                         nearest.data()};
  kernel.nearest(task, scratch(kernel.nearest_scratch(task)));
  const int32_t* next = nearest.data();
  for (int64_t y = by * grid.block_rows; y < grid.end_of_band(by); ++y)
    for (int64_t x = left; x < right; ++x) {
      const int64_t number = numbers[*next++];
      ++part.count[number - sums.first_group(by)];
      assignment[y * grid.columns + x] = static_cast<int32_t>(number);
    }
}

// Groups of the images of `p`.
void group_images(const PatchGroups& p, int threads) {
  const Input in{p.x, p.dtype, p.batch, p.heads, p.width, p.grid};
  const Kernels& kernel = kernels();
  const BlockGrid& grid = p.grid;
  const int64_t blocks = grid.blocks(), patches = in.patches(), tokens = grid.prefix + patches,
                lists = p.batch * p.heads, bands = grid.vertical();
  const BlockRows rows(in);
  const PartialSums sums(in);
  const SharedBuffer memory = allocate(lists * blocks * (p.width + 1) * static_cast<int64_t>(sizeof(float)));
  Means means{reinterpret_cast<float*>(memory.get()), nullptr};
  means.half_square = means.mean + lists * blocks * p.width;
  const std::vector<int32_t> block = block_of_token(grid);
  for (int64_t list = 0; list < lists; ++list)
    std::copy(block.begin() + grid.prefix, block.end(), p.assignment + list * patches);
  parallel_for(p.batch * bands, threads, [&](int64_t item) {
    const int64_t by = item % bands, b = item / bands;
    rows.copy_band(b, by);
    for (int64_t bx = 0; bx < grid.horizontal(); ++bx)
      for (int64_t head = 0; head < p.heads; ++head) {
        float sum[kMaxWidth] = {};
        kernel.add_rows(rows.row(b, head, by, bx, 0), p.dtype, rows.count(by, bx), p.width, p.width, sum);
        set_mean(means, (b * p.heads + head) * blocks + by * grid.horizontal() + bx, sum, rows.count(by, bx), p.width);
      }
  });
  for (int64_t step = 0; step < p.steps; ++step) {
    parallel_for(p.batch * bands, threads, [&](int64_t item) {
      const int64_t by = item % bands, b = item / bands;
      for (int64_t head = 0; head < p.heads; ++head) sums.empty_part(b, head, by);
      for (int64_t bx = 0; bx < grid.horizontal(); ++bx)
        for (int64_t head = 0; head < p.heads; ++head)
          join_nearest(in, rows, b, head, by, bx, means, sums, p.assignment + (b * p.heads + head) * patches);
    });
    sums.add_parts(
        threads, [&](int64_t group, const float* sum, int32_t count) { set_mean(means, group, sum, count, p.width); });
  }
  parallel_for(p.batch * bands, threads, [&](int64_t item) {
    const int64_t by = item % bands, b = item / bands;
    for (int64_t bx = 0; bx < grid.horizontal(); ++bx)
      for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t list = b * p.heads + head, left = bx * grid.block_columns,
                      breadth = std::min(grid.columns, left + grid.block_columns) - left;
        for (int64_t i = 0; i < rows.count(by, bx); ++i) {
          const int64_t patch = (by * grid.block_rows + i / breadth) * grid.columns + left + i % breadth;
          const float* mean = means.mean + (list * blocks + p.assignment[list * patches + patch]) * p.width;
          kernel.distances(rows.row(b, head, by, bx, i), p.dtype, 1, 0, p.width, mean,
                           p.distance + list * tokens + grid.prefix + patch);
        }
      }
  });
  const float zero[kMaxWidth] = {};
  for (int64_t list = 0; list < lists; ++list)
    for (int64_t token = 0; token < grid.prefix; ++token)
      kernel.distances(in.row(list / p.heads, list % p.heads, token), p.dtype, 1, 0, p.width, zero,
                       p.distance + list * tokens + token);
  for (int64_t group = 0; group < lists * blocks; ++group)
    kernel.store_row(means.mean + group * p.width, 1.0f, p.width, p.dtype,
                     static_cast<char*>(p.mean) + element_size(p.dtype) * group * p.width);
}

}  // namespace

void group_patches(const PatchGroups& p, int threads) {
  check_width(p.width);
  const int64_t patches = p.grid.rows * p.grid.columns, element = element_size(p.dtype);
  // As many images at a time as the memory that is kept anyway has room for.
  const int64_t image_bytes = std::max<int64_t>(1, p.heads * patches * p.width * element);
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kCachedBytes) / image_bytes);
  for (int64_t first = 0; first < p.batch; first += step) {
    PatchGroups part = p;
    part.batch = std::min(step, p.batch - first);
    part.x.data = static_cast<const char*>(p.x.data) + element * first * p.x.batch_stride;
    part.assignment = p.assignment + first * p.heads * patches;
    part.mean = static_cast<char*>(p.mean) + element * first * p.heads * p.grid.blocks() * p.width;
    part.distance = p.distance + first * p.heads * (p.grid.prefix + patches);
    group_images(part, threads);
  }
}

void pool_groups(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                 const int32_t* assignment, void* out, int threads) {
  check_width(width);
  const Input in{x, dtype, batch, heads, width, grid};
  const PartialSums sums(in);
  add_patches(in, assignment, sums, threads);
  sums.add_parts(threads, [&](int64_t group, const float* sum, int32_t count) {
    kernels().store_row(sum, count > 0 ? 1.0f / static_cast<float>(count) : 0.0f, width, dtype,
                        static_cast<char*>(out) + element_size(dtype) * group * width);
  });
}

}  // namespace sparsifiner
