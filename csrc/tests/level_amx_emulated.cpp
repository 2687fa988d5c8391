// The AMX level with its tiles in plain C++, on any CPU, so that tests can follow every tile where there is no AMX.
// In builds for tests only (SPARSIFINER_TESTS or SPARSIFINER_AMX_EMULATION); many times slower than the other levels.
#include "kernels/amx_table.h"
#include "simd/portable.h"
#include "simd/scalar_compressor.h"
#include "tests/amx_emulated_tiles.h"

namespace sparsifiner {
namespace {

struct PortablePairs : PortableVector<16> {
  static F dot(F lanes, uint32_t pair, F sum) {
    const I bits = (I)lanes, high = static_cast<int32_t>(0xffff0000) & bits;
    return sum + (F)(bits << 16) * from_bits(pair << 16) + (F)high * from_bits(pair & 0xffff0000);
  }

  // to[lane] = the bfloat16 of (even[lane], odd[lane]).
  static void store_pairs(uint32_t* to, F even, F odd) {
    float rows[32];
    uint16_t halves[32];
    store(rows, even);
    store(rows + 16, odd);
    narrow(rows, halves, 32);
    for (int i = 0; i < 16; ++i) to[i] = halves[i] | static_cast<uint32_t>(halves[16 + i]) << 16;
  }

  // to[d] = (even[d], odd[d]); a missing row counts as zeros.
  static void pair_rows(const void* even, const void* odd, uint32_t* to, int width) {
    for (int d = 0; d < width; ++d) {
      const uint32_t high = odd != nullptr ? static_cast<const uint16_t*>(odd)[d] : 0;
      to[d] = static_cast<const uint16_t*>(even)[d] | high << 16;
    }
  }
};

}  // namespace

constexpr Kernels amx_emulated_kernels = amx_table<PortablePairs, ScalarCompressor, EmulatedTiles>();

}  // namespace sparsifiner
