// Memory that several threads fill and read during one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace sparsifiner {

// Fresh memory costs more than what is done with it here: the system clears every page and enters it at its first use.
// So each calling thread keeps the largest block it has returned, of at most this many bytes.
constexpr std::size_t kKeptBytes = std::size_t{13} << 20;

struct Block {
  char* data = nullptr;
  std::size_t bytes = 0;
};

struct KeptBlock : Block {
  ~KeptBlock() { std::free(data); }
};

inline thread_local KeptBlock kept_block;

struct Return {
  std::size_t bytes = 0;
  void operator()(char* data) const {
    Block block{data, bytes};
    if (bytes <= kKeptBytes && bytes > kept_block.bytes) std::swap(block, static_cast<Block&>(kept_block));
    std::free(block.data);
  }
};
using Memory = std::unique_ptr<char, Return>;

// At least `bytes` bytes, 64-byte aligned, contents undefined. To be returned on the thread that asked.
inline Memory allocate(int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
  if (kept_block.data != nullptr && kept_block.bytes >= rounded) {
    const Block block = std::exchange(static_cast<Block&>(kept_block), {});
    return Memory(block.data, Return{block.bytes});
  }
  Memory memory(static_cast<char*>(std::aligned_alloc(64, rounded)), Return{rounded});
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace sparsifiner
