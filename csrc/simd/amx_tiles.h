// The tile unit of amx.h in AMX instructions.
//
// Written as assembly, not with the compilers' intrinsics: g++ defines those as macros that want the register
// numbers as literals, and up to version 12 its _tile_loadd does not say that it reads memory, so that
// stores of the data it loads may be moved behind it.
#pragma once

#include <cstdint>

namespace sparsifiner {
namespace {

struct AmxTiles {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);

  static void configure() {
    static constexpr Configuration all_tiles{};
    asm volatile("ldtilecfg %0" : : "m"(all_tiles) : "memory");
  }
  static void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t) : "memory");
  }

  template <int t>
  static void load(const void* words, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(words), "r"(4 * stride), "i"(t) : "memory");
  }

  template <int t>
  static void store(void* words, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(words), "r"(4 * stride), "i"(t) : "memory");
  }

  template <int c, int a, int b>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b) : "memory");
  }
};

}  // namespace
}  // namespace sparsifiner
