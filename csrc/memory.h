// Memory that several threads fill and read during one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparsifiner {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// At least `bytes` bytes, 64-byte aligned, contents undefined.
inline Memory allocate(int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
  Memory memory(static_cast<char*>(std::aligned_alloc(64, rounded)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace sparsifiner
