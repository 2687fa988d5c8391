// What every function of the core asks of its inputs.
#pragma once

#include <stdexcept>
#include <string>

#include "sparsifiner.h"

namespace sparsifiner {

inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline void check_width(int64_t width) {
  if (width < 16 || width > 128 || width % 16 != 0)
    throw std::invalid_argument("head width must be a multiple of 16 from 16 to 128, got " + std::to_string(width));
}

}  // namespace sparsifiner
