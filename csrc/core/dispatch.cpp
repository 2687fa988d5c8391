// Which instruction sets run here, and which one is in use.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "core/amx_support.h"
#include "core/kernel_table.h"
#include "core/sparsifiner.h"

namespace sparsifiner {
namespace {

struct Entry {
  Level level;
  const char* name;
  const Kernels* kernels;  // null where this build has none
};

#if defined(SPARSIFINER_X86)
#define SPARSIFINER_X86_KERNELS(table) &table
#else
#define SPARSIFINER_X86_KERNELS(table) nullptr
#endif
#if defined(SPARSIFINER_AMX)
#define SPARSIFINER_AMX_KERNELS(table) &table
#else
#define SPARSIFINER_AMX_KERNELS(table) nullptr
#endif

#if defined(SPARSIFINER_AMX_EMULATION)
#define SPARSIFINER_EMULATED_KERNELS(table) &table
#else
#define SPARSIFINER_EMULATED_KERNELS(table) nullptr
#endif

constexpr Entry entries[] = {{Level::portable, "portable", &portable_kernels},
                             {Level::avx2, "avx2", SPARSIFINER_X86_KERNELS(avx2_kernels)},
                             {Level::avx512, "avx512", SPARSIFINER_X86_KERNELS(avx512_kernels)},
                             {Level::avx512vnni, "avx512vnni", SPARSIFINER_X86_KERNELS(avx512vnni_kernels)},
                             {Level::avx512bf16, "avx512bf16", SPARSIFINER_X86_KERNELS(avx512bf16_kernels)},
                             {Level::amx, "amx", SPARSIFINER_AMX_KERNELS(amx_kernels)},
                             {Level::amx_emulated, "amx_emulated", SPARSIFINER_EMULATED_KERNELS(amx_emulated_kernels)}};
constexpr int kLevels = sizeof entries / sizeof entries[0];

const Entry& entry_of(Level level) { return entries[static_cast<int>(level)]; }

#if defined(SPARSIFINER_X86)
std::string cpu_lacks(Level level) {
  __builtin_cpu_init();
  switch (level) {
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "" : "this CPU has no AVX2 with FMA";
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     cpu_lacks(Level::avx2).empty()
                 ? ""
                 : "this CPU has no AVX-512 F, BW, DQ and VL";
    case Level::avx512vnni:
      return __builtin_cpu_supports("avx512vnni") && cpu_lacks(Level::avx512).empty()
                 ? ""
                 : "this CPU has no AVX-512 with products of bytes (VNNI)";
    case Level::avx512bf16:
      return __builtin_cpu_supports("avx512bf16") && cpu_lacks(Level::avx512vnni).empty()
                 ? ""
                 : "this CPU has no AVX-512 with products of bfloat16 and of bytes (BF16, VNNI)";
    case Level::amx: {
      const std::string missing = cpu_lacks(Level::avx512bf16);
      return missing.empty() ? why_no_tiles() : missing;
    }
    default: return "";
  }
}
#else
std::string cpu_lacks(Level) { return ""; }
#endif

std::string find_reason(const Entry& entry) {
  if (entry.kernels == nullptr) {
    if (entry.level == Level::amx_emulated) return "only builds with SPARSIFINER_AMX_EMULATION have it, for tests";
#if defined(SPARSIFINER_X86)
    return "the compiler that built this does not know its instructions";
#else
    return "it is for x86-64";
#endif
  }
  const std::string missing = cpu_lacks(entry.level);
  if (!missing.empty() || entry.level != Level::amx) return missing;
  const std::string wrong = compare_kernels(*entry.kernels, *entry_of(Level::avx512bf16).kernels);
  return wrong.empty() ? "" : "it failed its self-check at first use: " + wrong;
}

struct Reasons {
  std::string of[kLevels];
  Reasons() {
    for (int i = 0; i < kLevels; ++i) of[i] = find_reason(entries[i]);
  }
};

const std::string& reason(Level level) {
  static const Reasons reasons;  // the CPU is asked once
  return reasons.of[static_cast<int>(level)];
}

const Entry& best() { return entry_of(available_levels().back()); }

std::atomic<const Entry*> forced{nullptr};

const Entry& active() {
  static const Entry& automatic = best();
  const Entry* entry = forced.load(std::memory_order_acquire);
  return entry != nullptr ? *entry : automatic;
}

}  // namespace

const char* level_name(Level level) { return entry_of(level).name; }

std::vector<Level> all_levels() {
  std::vector<Level> levels;
  for (const Entry& entry : entries)
    if (entry.level != Level::amx_emulated) levels.push_back(entry.level);
  return levels;
}

std::string why_not(Level level) { return reason(level); }

std::vector<Level> available_levels() {
  std::vector<Level> levels;
  for (Level level : all_levels())
    if (reason(level).empty()) levels.push_back(level);
  return levels;
}

Level active_level() { return active().level; }

std::vector<Precision> available_precisions() {
  std::vector<Precision> precisions{Precision::same};
  if (kernels().bfloat16_products) precisions.push_back(Precision::bfloat16);
  if (kernels().attend_int8 != nullptr) precisions.push_back(Precision::int8);
  return precisions;
}

const Kernels& kernels() { return *active().kernels; }

void force_level(const std::string& name) {
  if (name.empty()) {
    forced.store(nullptr, std::memory_order_release);
    return;
  }
  std::string names, why;
  for (const Entry& entry : entries) {
    if (name == entry.name) {
      why = reason(entry.level);
      if (why.empty()) {
        forced.store(&entry, std::memory_order_release);
        return;
      }
      why = " (" + why + ")";
    }
  }
  for (Level level : available_levels()) names += (names.empty() ? "" : ", ") + std::string(level_name(level));
  throw std::invalid_argument("CPU level \"" + name + "\" is not available here" + why + "; this machine has " + names);
}

}  // namespace sparsifiner
