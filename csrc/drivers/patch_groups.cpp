// Groups of patches with like rows, and means over them.
#include <algorithm>
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

// Every patch of one block of one head joins the nearest of the means around, and is added to its next one.
void join_nearest(const Input& in, int64_t b, int64_t head, int64_t by, int64_t bx, const Means& means,
                  const PartialSums& sums, int32_t* assignment) {
  const BlockGrid& grid = in.grid;
  const Kernels& kernel = kernels();
  const int64_t left = bx * grid.block_columns, right = std::min(grid.columns, left + grid.block_columns);
  thread_local std::vector<const void*> rows;
  thread_local std::vector<int32_t> nearest;
  rows.clear();
  const int64_t last = grid.prefix + in.patches() - 1;
  for (int64_t y = by * grid.block_rows; y < grid.end_of_band(by); ++y)
    for (int64_t x = left; x < right; ++x) {
      const int64_t token = grid.prefix + y * grid.columns + x;
      rows.push_back(in.row(b, head, token));
      in.fetch(head + 1 < in.heads ? in.row(b, head + 1, token)
                                   : in.row(b, 0, std::min(last, token + grid.block_columns)));
    }
  nearest.resize(rows.size());
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

}  // namespace

void group_patches(const PatchGroups& p, int threads) {
  check_width(p.width);
  const Input in{p.x, p.dtype, p.batch, p.heads, p.width, p.grid};
  const Kernels& kernel = kernels();
  const BlockGrid& grid = p.grid;
  const int64_t blocks = grid.blocks(), patches = in.patches(), tokens = grid.prefix + patches,
                lists = p.batch * p.heads;
  const PartialSums sums(in);
  const SharedBuffer memory = allocate(lists * blocks * (p.width + 1) * static_cast<int64_t>(sizeof(float)));
  Means means{reinterpret_cast<float*>(memory.get()), nullptr};
  means.half_square = means.mean + lists * blocks * p.width;
  const std::vector<int32_t> block = block_of_token(grid);
  for (int64_t list = 0; list < lists; ++list)
    std::copy(block.begin() + grid.prefix, block.end(), p.assignment + list * patches);
  const auto take_means = [&] {
    sums.add_parts(threads, [&](int64_t group, const float* sum, int32_t count) {
      if (count == 0) return;
      float* mean = means.mean + group * p.width;
      kernel.store_row(sum, 1.0f / static_cast<float>(count), p.width, DType::float32, mean);
      means.half_square[group] = kernel.half_square(mean, static_cast<int>(p.width));
    });
  };
  add_patches(in, p.assignment, sums, threads);
  take_means();
  for (int64_t step = 0; step < p.steps; ++step) {
    parallel_for(p.batch * grid.vertical(), threads, [&](int64_t item) {
      const int64_t by = item % grid.vertical(), b = item / grid.vertical();
      for (int64_t head = 0; head < p.heads; ++head) sums.empty_part(b, head, by);
      for (int64_t bx = 0; bx < grid.horizontal(); ++bx)
        for (int64_t head = 0; head < p.heads; ++head)
          join_nearest(in, b, head, by, bx, means, sums, p.assignment + (b * p.heads + head) * patches);
    });
    take_means();
  }
  const float zero[kMaxWidth] = {};
  parallel_for(p.batch * (grid.vertical() + 1), threads, [&](int64_t item) {
    const int64_t b = item / (grid.vertical() + 1), band = item % (grid.vertical() + 1) - 1;
    const bool prefix = band < 0;
    const int64_t first = prefix ? 0 : grid.prefix + band * grid.block_rows * grid.columns;
    const int64_t end = prefix ? grid.prefix : grid.prefix + grid.end_of_band(band) * grid.columns;
    for (int64_t token = first; token < end; ++token)
      for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t list = b * p.heads + head;
        const float* mean =
            prefix ? zero : means.mean + (list * blocks + p.assignment[list * patches + token - grid.prefix]) * p.width;
        kernel.distances(in.row(b, head, token), p.dtype, 1, 0, p.width, mean, p.distance + list * tokens + token);
      }
  });
  for (int64_t group = 0; group < lists * blocks; ++group)
    kernel.store_row(means.mean + group * p.width, 1.0f, p.width, p.dtype,
                     static_cast<char*>(p.mean) + element_size(p.dtype) * group * p.width);
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
