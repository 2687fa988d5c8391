// Selection, log-counts and pooling: checks, and the loops over rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "inputs.h"
#include "kernels.h"
#include "parallel.h"

namespace sparsifiner {

void topk(const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t k,
          int32_t* indices, int64_t out_stride, int32_t offset, int threads) {
  if (k < 0 || k > columns)
    throw std::invalid_argument("top-k of " + std::to_string(columns) + " columns needs 0 <= k <= " +
                                std::to_string(columns) + ", got " + std::to_string(k));
  if (columns + static_cast<int64_t>(offset) > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("too many columns for 32-bit indices");
  if (k == 0) return;
  const Kernels& kernel = kernels();
  constexpr int64_t group = 4;
  parallel_for((rows + group - 1) / group, threads, [&](int64_t item) {
    void* memory = scratch(topk_scratch(columns));
    for (int64_t row = item * group; row < std::min(rows, (item + 1) * group); ++row) {
      const void* from = static_cast<const char*>(scores) + element_size(dtype) * row * row_stride;
      if (!kernel.topk(from, dtype, columns, k, offset, indices + row * out_stride, memory))
        throw not_a_number("top-k: row " + std::to_string(row) + " of the scores holds");
    }
  });
}

void log_counts(const int32_t* indices, const float* bias, int64_t rows, int64_t kept, const BlockGrid& grid,
                const int32_t* member, int64_t rows_per_head, float* counts, int threads) {
  const int64_t blocks = grid.blocks(), patches = grid.rows * grid.columns;
  const std::vector<int32_t> block = block_of_token(grid);
  const int64_t tokens = static_cast<int64_t>(block.size());
  // Keys of each group, one list per head; a single one where the groups are the blocks.
  const int64_t lists = member == nullptr || rows == 0 ? 1 : (rows + rows_per_head - 1) / rows_per_head;
  std::vector<int32_t> sizes(static_cast<std::size_t>(lists * (blocks + 1)), 0);
  for (int64_t list = 0; list < lists; ++list)
    for (int64_t patch = 0; patch < patches; ++patch) {
      const int32_t group = member == nullptr ? block[grid.prefix + patch] : member[list * patches + patch];
      if (group < 0 || group >= blocks) throw std::out_of_range("groups must lie in [0, " + std::to_string(blocks) + ")");
      ++sizes[list * (blocks + 1) + group];
    }
  std::vector<float> log_of(*std::max_element(sizes.begin(), sizes.end()) + 1);
  for (std::size_t n = 0; n < log_of.size(); ++n) log_of[n] = n > 0 ? std::log(static_cast<float>(n)) : -INFINITY;
  constexpr int64_t chunk = 8;
  parallel_for((rows + chunk - 1) / chunk, threads, [&](int64_t item) {
    int32_t* left = static_cast<int32_t*>(scratch(sizeof(int32_t) * static_cast<std::size_t>(blocks + 1)));
    for (int64_t row = item * chunk; row < std::min(rows, (item + 1) * chunk); ++row) {
      const int64_t list = member == nullptr ? 0 : row / rows_per_head;
      const int32_t* group = member == nullptr ? block.data() + grid.prefix : member + list * patches;
      std::copy_n(sizes.begin() + list * (blocks + 1), blocks + 1, left);
      const int32_t* index = indices + row * kept;
      for (int64_t i = 0; i < kept; ++i) {
        if (index[i] < 0 || index[i] >= tokens)
          throw std::out_of_range("connectivity.indices must lie in [0, " + std::to_string(tokens) +
                                  "), the number of keys, got " + std::to_string(index[i]));
        if (index[i] < grid.prefix) continue;  // in no group
        if (bias == nullptr || bias[row * kept + i] > -INFINITY) --left[group[index[i] - grid.prefix]];
      }
      for (int64_t b = 0; b < blocks; ++b) counts[row * blocks + b] = log_of[std::max(left[b], 0)];
    }
  });
}

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
          kernel.add_rows(static_cast<const char*>(x.data) + element * offset, dtype, right - left,
                          x.token_stride, width, sum);
        }
        const int64_t row = (b * heads + head) * grid.blocks() + by * grid.horizontal() + bx;
        kernel.store_row(sum, mean, width, dtype, static_cast<char*>(out) + element * row * width);
      }
    }
  });
}

}  // namespace sparsifiner
