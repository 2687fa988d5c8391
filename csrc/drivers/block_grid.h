// Blocks of a patch grid.
#pragma once

#include <cstdint>
#include <vector>

#include "core/sparsifiner.h"

namespace sparsifiner {

// Block number of each token; prefix tokens lie in an extra last block.
inline std::vector<int32_t> block_of_token(const BlockGrid& grid) {
  std::vector<int32_t> block(grid.prefix, static_cast<int32_t>(grid.blocks()));
  block.reserve(grid.prefix + grid.rows * grid.columns);
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x)
      block.push_back(static_cast<int32_t>(y / grid.block_rows * grid.horizontal() + x / grid.block_columns));
  return block;
}

}  // namespace sparsifiner
