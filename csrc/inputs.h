// What the functions of the core ask of their inputs, and where patches lie.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "sparsifiner.h"

namespace sparsifiner {

inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline void check_width(int64_t width) {
  if (width < 16 || width > kMaxWidth || width % 16 != 0)
    throw std::invalid_argument("head width must be a multiple of 16 from 16 to " + std::to_string(kMaxWidth) + ", got " +
                                std::to_string(width));
}

// ``what`` ends with the verb: "row 3 of the scores holds".
inline std::invalid_argument not_a_number(const std::string& what) {
  return std::invalid_argument(what + " NaN; look for NaN or infinity in the images or the weights");
}

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
