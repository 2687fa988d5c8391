// AVX-512 with products of bfloat16, and of bytes (VNNI), which every such CPU has. Compiled with flags for them;
// reached only where the CPU has them.
#include "kernels/int8_scores.h"
#include "kernels/table.h"
#include "simd/avx512_bf16.h"
#include "simd/avx512_vnni.h"

namespace sparsifiner {
namespace {

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx512, Mode::plain>(task, memory);
  else
    attend_tile<Avx512Bf16, Mode::dot>(task, memory);
}

constexpr Kernels make_table() {
  Kernels table = float32_kernels<Avx512, Avx512Compressor>();
  table.attend = attend;
  table.bfloat16_products = true;
  table.attend_int8 = attend_tile<Avx512Vnni, Mode::int8>;
  table.round_key = round_key<Avx512Vnni>;
  table.key_words = int8_key_words;
  table.pack_keys = pack_keys_as_int8<Avx512Vnni>;
  table.score = score_in_int8<Avx512Vnni, Avx512Compressor>;
  table.block_words = block_words<Mode::dot>;
  table.pack_block = pack_block<Mode::dot>;
  table.score_blocks = score_blocks<Avx512Bf16, Mode::dot, Avx512Compressor>;
  return table;
}

}  // namespace

constexpr Kernels avx512bf16_kernels = make_table();

}  // namespace sparsifiner
