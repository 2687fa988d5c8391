// Checks of inputs that several drivers share.
#pragma once

#include <stdexcept>
#include <string>

#include "core/sparsifiner.h"

namespace sparsifiner {

inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline void check_width(int64_t width) {
  if (width < 16 || width > kMaxWidth || width % 16 != 0)
    throw std::invalid_argument("head width must be a multiple of 16 from 16 to " + std::to_string(kMaxWidth) +
                                ", got " + std::to_string(width));
}

// ``what`` ends with the verb: "row 3 of the scores holds".
inline std::invalid_argument not_a_number(const std::string& what) {
  return std::invalid_argument(what + " NaN; look for NaN or infinity in the images or the weights");
}

}  // namespace sparsifiner
