// Numbers of keys per group that a tile did not keep.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "core/sparsifiner.h"
#include "drivers/block_grid.h"

namespace sparsifiner {

void log_counts(const int32_t* indices, const float* bias, int64_t rows, int64_t kept, const BlockGrid& grid,
                const int32_t* assignment, int64_t rows_per_head, float* counts, int threads) {
  const int64_t blocks = grid.blocks(), patches = grid.rows * grid.columns;
  const std::vector<int32_t> block = block_of_token(grid);
  const int64_t tokens = static_cast<int64_t>(block.size());
  // Keys of each group, one list per head; a single one where the groups are the blocks.
  const int64_t lists = assignment == nullptr || rows == 0 ? 1 : (rows + rows_per_head - 1) / rows_per_head;
  std::vector<int32_t> sizes(static_cast<std::size_t>(lists * (blocks + 1)), 0);
  for (int64_t list = 0; list < lists; ++list)
    for (int64_t patch = 0; patch < patches; ++patch) {
      const int32_t group = assignment == nullptr ? block[grid.prefix + patch] : assignment[list * patches + patch];
      if (group < 0 || group >= blocks)
        throw std::out_of_range("groups must lie in [0, " + std::to_string(blocks) + ")");
      ++sizes[list * (blocks + 1) + group];
    }
  std::vector<float> log_of(*std::max_element(sizes.begin(), sizes.end()) + 1);
  for (std::size_t n = 0; n < log_of.size(); ++n) log_of[n] = n > 0 ? std::log(static_cast<float>(n)) : -INFINITY;
  constexpr int64_t chunk = 8;
  parallel_for((rows + chunk - 1) / chunk, threads, [&](int64_t item) {
    int32_t* left = static_cast<int32_t*>(scratch(sizeof(int32_t) * static_cast<std::size_t>(blocks + 1)));
    for (int64_t row = item * chunk; row < std::min(rows, (item + 1) * chunk); ++row) {
      const int64_t list = assignment == nullptr ? 0 : row / rows_per_head;
      const int32_t* group = assignment == nullptr ? block.data() + grid.prefix : assignment + list * patches;
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

}  // namespace sparsifiner
