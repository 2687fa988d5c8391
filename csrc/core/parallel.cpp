#include "core/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/aligned_memory.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace sparsifiner {
namespace {

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t items;
  void (*body)(void*, int64_t);
  void* context;
  std::mutex mutex;
  std::exception_ptr error;
};

void work(void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  try {
    for (int64_t item; (item = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.items;)
      loop.body(loop.context, item);
  } catch (...) {
    std::lock_guard<std::mutex> lock(loop.mutex);
    if (!loop.error) loop.error = std::current_exception();
    loop.next = loop.items;
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded keeps its threads spinning between regions; threads of our own
// would compete with them for the same cores.
GompParallel gomp_parallel() {
#if defined(__linux__)
  static const GompParallel found = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (symbol == nullptr) {
      if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, "GOMP_parallel");
    }
    return reinterpret_cast<GompParallel>(symbol);
  }();
  return found;
#else
  return nullptr;
#endif
}

struct ThreadScratch {
  void* memory = nullptr;
  std::size_t size = 0;
  ~ThreadScratch() { release_aligned(memory); }
};

}  // namespace

void parallel_items(int64_t items, int threads, void (*body)(void*, int64_t), void* context) {
  Loop loop;
  loop.items = items;
  loop.body = body;
  loop.context = context;
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    work(&loop);
  } else if (GompParallel run = gomp_parallel()) {
    run(work, &loop, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &loop);
    work(&loop);
    for (std::thread& helper : helpers) helper.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

void* scratch(std::size_t bytes) {
  thread_local ThreadScratch block;
  if (block.size < bytes) {
    release_aligned(block.memory);
    block.size = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    block.memory = allocate_aligned(4096, rounded);
    if (block.memory == nullptr) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.memory;
}

}  // namespace sparsifiner
