// Selection of the wanted elements of an array without an instruction for it.
#pragma once

#include <cstdint>

namespace sparsifiner {
namespace {

// Always write, advance where the key is wanted.
struct ScalarCompressor {
  static int64_t range(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = keys[i];
      out[count] = key;
      count += (key >= low) & (key <= high);
    }
    return count;
  }
  static void indices(const int32_t* keys, int64_t n, int32_t low, int32_t offset, int32_t* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      out[count] = static_cast<int32_t>(i) + offset;
      count += keys[i] >= low;
    }
  }
};

}  // namespace
}  // namespace sparsifiner
