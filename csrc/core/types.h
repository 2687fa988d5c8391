// Types that the public interface and the kernels share. Free of the standard library's templates, because the
// level_*.cpp files include it.
#pragma once

#include <cstdint>

namespace sparsifiner {

enum class DType { float32, bfloat16 };

// Precision of the products of attention in float32: the same, or one they may be rounded to where the instruction set
// gains by it. bfloat16: queries, keys, softmax weights and values are rounded. int8: queries and keys are rounded to 8
// bits, after a vector near the mean key is taken off the keys, which changes no softmax (Zhang et al., SageAttention,
// 2024); weights and values stay float32. Sums are always float32.
enum class Precision { same, bfloat16, int8 };

constexpr int kMaxWidth = 128;  // of a head

}  // namespace sparsifiner
