// Means over blocks of the patch grid, and distances of rows from the mean of their block.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/sparsifiner.h"

namespace sparsifiner {

void pool_blocks(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                 void* out, int threads) {
  if (width < 1 || width > kMaxWidth)
    throw std::invalid_argument("pooling needs a width from 1 to " + std::to_string(kMaxWidth));
  const Kernels& kernel = kernels();
  const int64_t element = element_size(dtype);
  // Heads of a token are neighbours in memory, so they come last.
  parallel_for(batch * grid.vertical(), threads, [&](int64_t item) {
    const int64_t by = item % grid.vertical(), b = item / grid.vertical();
    const int64_t top = by * grid.block_rows, bottom = std::min(grid.rows, top + grid.block_rows);
    for (int64_t bx = 0; bx < grid.horizontal(); ++bx) {
      const int64_t left = bx * grid.block_columns, right = std::min(grid.columns, left + grid.block_columns);
      const float mean = 1.0f / static_cast<float>((bottom - top) * (right - left));
      for (int64_t head = 0; head < heads; ++head) {
        float sum[kMaxWidth] = {};
        for (int64_t y = top; y < bottom; ++y) {
          const int64_t token = grid.prefix + y * grid.columns + left;
          const int64_t offset = b * x.batch_stride + head * x.head_stride + token * x.token_stride;
          kernel.add_rows(static_cast<const char*>(x.data) + element * offset, dtype, right - left, x.token_stride,
                          width, sum);
        }
        const int64_t row = (b * heads + head) * grid.blocks() + by * grid.horizontal() + bx;
        kernel.store_row(sum, mean, width, dtype, static_cast<char*>(out) + element * row * width);
      }
    }
  });
}

void block_distances(const Rows& x, DType dtype, int64_t batch, int64_t heads, int64_t width, const BlockGrid& grid,
                     float* out, int threads) {
  check_width(width);
  const Kernels& kernel = kernels();
  const int64_t tokens = grid.prefix + grid.rows * grid.columns;
  parallel_for(batch * heads * (grid.vertical() + 1), threads, [&](int64_t item) {
    const int64_t head = item / (grid.vertical() + 1), by = item % (grid.vertical() + 1) - 1;
    const char* from = static_cast<const char*>(x.data) +
                       element_size(dtype) * (head / heads * x.batch_stride + head % heads * x.head_stride);
    float* to = out + head * tokens;
    if (by < 0) {  // prefix tokens lie in no block: their distance is that from zero
      const float zero[kMaxWidth] = {};
      kernel.distances(from, dtype, grid.prefix, x.token_stride, width, zero, to);
      return;
    }
    const int64_t top = by * grid.block_rows, bottom = std::min(grid.rows, top + grid.block_rows);
    for (int64_t left = 0; left < grid.columns; left += grid.block_columns) {
      const int64_t right = std::min(grid.columns, left + grid.block_columns);
      float mean[kMaxWidth] = {};
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t token = grid.prefix + y * grid.columns + left;
        kernel.add_rows(from + element_size(dtype) * token * x.token_stride, dtype, right - left, x.token_stride, width,
                        mean);
      }
      for (int64_t d = 0; d < width; ++d) mean[d] /= static_cast<float>((bottom - top) * (right - left));
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t token = grid.prefix + y * grid.columns + left;
        kernel.distances(from + element_size(dtype) * token * x.token_stride, dtype, right - left, x.token_stride,
                         width, mean, to + token);
      }
    }
  });
}

}  // namespace sparsifiner
