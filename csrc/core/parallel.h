// A parallel loop that shares torch's threads instead of starting a second pool beside them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsifiner {

// Calls body(context, item) for every item in [0, items), on at most `threads` threads, in rising order of
// hand-out. The first exception is rethrown after all threads have stopped.
void parallel_items(int64_t items, int threads, void (*body)(void* context, int64_t item), void* context);

template <class Body>
void parallel_for(int64_t items, int threads, Body&& body) {
  parallel_items(items, threads, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

// SharedBuffer of the calling thread that lives as long as the thread; 64-byte aligned, contents undefined.
void* scratch(std::size_t bytes);

}  // namespace sparsifiner
