// Memory with an alignment; Windows has no std::aligned_alloc.
#pragma once

#include <cstddef>
#include <cstdlib>
#ifdef _WIN32
#include <malloc.h>
#endif

namespace sparsifiner {

// `bytes` is a multiple of `alignment`; null if there is no memory. To be given back by release_aligned.
inline void* allocate_aligned(std::size_t alignment, std::size_t bytes) {
#ifdef _WIN32
  return _aligned_malloc(bytes, alignment);
#else
  return std::aligned_alloc(alignment, bytes);
#endif
}

inline void release_aligned(void* memory) {
#ifdef _WIN32
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

}  // namespace sparsifiner
