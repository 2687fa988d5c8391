#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace sparsifiner {
namespace {

struct Entry {
  Level level;
  const Kernels* kernels;
};

#if defined(SPARSIFINER_X86)
bool supported(Level level) {
  __builtin_cpu_init();
  switch (level) {
    case Level::portable:
      return true;
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && supported(Level::avx2);
    case Level::avx512bf16:
      return __builtin_cpu_supports("avx512bf16") && supported(Level::avx512);
  }
  return false;
}
constexpr Entry entries[] = {{Level::portable, &portable_kernels},
                             {Level::avx2, &avx2_kernels},
                             {Level::avx512, &avx512_kernels},
                             {Level::avx512bf16, &avx512bf16_kernels}};
#else
bool supported(Level) { return true; }
constexpr Entry entries[] = {{Level::portable, &portable_kernels}};
#endif

const Entry& best() {
  const Entry* found = &entries[0];
  for (const Entry& entry : entries)
    if (supported(entry.level)) found = &entry;
  return *found;
}

std::atomic<const Entry*> forced{nullptr};

const Entry& active() {
  static const Entry& automatic = best();
  const Entry* entry = forced.load(std::memory_order_acquire);
  return entry != nullptr ? *entry : automatic;
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
    case Level::portable:
      return "portable";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::avx512bf16:
      return "avx512bf16";
  }
  return "unknown";
}

std::vector<Level> available_levels() {
  std::vector<Level> levels;
  for (const Entry& entry : entries)
    if (supported(entry.level)) levels.push_back(entry.level);
  return levels;
}

Level active_level() { return active().level; }
const Kernels& kernels() { return *active().kernels; }

void force_level(const std::string& name) {
  if (name.empty()) {
    forced.store(nullptr, std::memory_order_release);
    return;
  }
  std::string names;
  for (const Entry& entry : entries) {
    if (!supported(entry.level)) continue;
    if (name == level_name(entry.level)) {
      forced.store(&entry, std::memory_order_release);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(level_name(entry.level));
  }
  throw std::invalid_argument("CPU level \"" + name + "\" is not available here; this machine has " + names);
}

}  // namespace sparsifiner
