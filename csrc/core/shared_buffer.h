// SharedBuffer that several threads fill and read during one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "core/aligned_memory.h"

namespace sparsifiner {

// Fresh memory costs more than what is done with it here: the system clears every page and enters it at its first use.
// So each calling thread keeps the largest block it has returned, of at most this many bytes.
constexpr std::size_t kCachedBytes = std::size_t{13} << 20;

struct MemoryBlock {
  char* data = nullptr;
  std::size_t bytes = 0;
};

struct CachedBlock : MemoryBlock {
  ~CachedBlock() { release_aligned(data); }
};

inline thread_local CachedBlock cached_block;

struct Recycle {
  std::size_t bytes = 0;
  void operator()(char* data) const {
    MemoryBlock block{data, bytes};
    if (bytes <= kCachedBytes && bytes > cached_block.bytes) std::swap(block, static_cast<MemoryBlock&>(cached_block));
    release_aligned(block.data);
  }
};
using SharedBuffer = std::unique_ptr<char, Recycle>;

// At least `bytes` bytes, 64-byte aligned, contents undefined. To be returned on the thread that asked.
inline SharedBuffer allocate(int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
  if (cached_block.data != nullptr && cached_block.bytes >= rounded) {
    const MemoryBlock block = std::exchange(static_cast<MemoryBlock&>(cached_block), {});
    return SharedBuffer(block.data, Recycle{block.bytes});
  }
  SharedBuffer memory(static_cast<char*>(allocate_aligned(64, rounded)), Recycle{rounded});
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace sparsifiner
