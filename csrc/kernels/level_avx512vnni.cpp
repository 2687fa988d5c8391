// AVX-512 with products of bytes (VNNI) and without products of bfloat16: Cascade Lake, Ice Lake. Compiled with flags
// for them; reached only where the CPU has them.
#include "kernels/int8_scores.h"
#include "kernels/table.h"
#include "simd/avx512.h"
#include "simd/avx512_vnni.h"

namespace sparsifiner {
namespace {

constexpr Kernels make_table() {
  Kernels table = float32_kernels<Avx512, Avx512Compressor>();
  table.attend_int8 = attend_tile<Avx512Vnni, Mode::int8>;
  table.round_key = round_key<Avx512Vnni>;
  table.key_words = int8_key_words;
  table.pack_keys = pack_keys_as_int8<Avx512Vnni>;
  table.score = score_in_int8<Avx512Vnni, Avx512Compressor>;
  return table;
}

}  // namespace

constexpr Kernels avx512vnni_kernels = make_table();

}  // namespace sparsifiner
