// Carves arrays out of one block of scratch memory.
#pragma once

#include <cstddef>

namespace sparsifiner {
namespace {  // the level_*.cpp files compile this with flags of their own

// Each array starts at a cache line. From a null base it only counts the bytes that the arrays need.
struct BumpAllocator {
  char* base;
  std::size_t used = 0;
  template <class T>
  T* allocate(std::size_t count) {
    T* start = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return start;
  }
};

}  // namespace
}  // namespace sparsifiner
