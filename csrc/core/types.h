// Types that the public interface and the kernels share. Free of the standard library's templates, because the
// level_*.cpp files include it.
#pragma once

#include <cstdint>

namespace sparsifiner {

enum class DType { float32, bfloat16 };

constexpr int kMaxWidth = 128;  // of a head

}  // namespace sparsifiner
