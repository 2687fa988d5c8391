// AMX tiles for bfloat16, AVX-512 for the rest. Compiled with flags for them; reached only where the CPU and
// the operating system grant them and amx_support.cpp has seen right results. Developed on a machine
// without AMX: tested over an emulated tile unit and with its instructions trapped (tests/amx_tests.cpp).
#include "kernels/amx_table.h"
#include "simd/amx_tiles.h"
#include "simd/avx512_bf16.h"

namespace sparsifiner {

constexpr Kernels amx_kernels = amx_table<Avx512Bf16, Avx512Compressor, AmxTiles>();

}  // namespace sparsifiner
