// Selection of the largest scores of every row.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/checks.h"
#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/sparsifiner.h"

namespace sparsifiner {

void topk(const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t k,
          int32_t* indices, int64_t out_stride, int32_t offset, int threads) {
  if (k < 0 || k > columns)
    throw std::invalid_argument("top-k of " + std::to_string(columns) +
                                " columns needs 0 <= k <= " + std::to_string(columns) + ", got " + std::to_string(k));
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

}  // namespace sparsifiner
