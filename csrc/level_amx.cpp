// AMX tiles for bfloat16, AVX-512 for the rest. Compiled with flags for them; reached only where the CPU and
// the operating system grant them and amx_support.cpp has seen right results. Developed on a machine
// without AMX: tested through level_amx_emulated.cpp and with its instructions trapped (tests/amx_tests.cpp); its
// speed is not known.
#include "kernels.h"

#include <immintrin.h>

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_avx512_vector.h"
#include "level_avx512bf16_vector.h"
#include "topk_kernel.h"
#include "score_kernel.h"
#include "quad_kernel.h"
#include "group_kernel.h"
#include "amx_kernel.h"
#include "amx_hardware_tiles.h"

using Float = Avx512;
using Pairs = Avx512Bf16;
using Tiles = HardwareTiles;
using Compressor = Avx512Compressor;
#include "amx_level.h"
}  // namespace

extern const Kernels amx_kernels;
const Kernels amx_kernels = level_kernels;

}  // namespace sparsifiner
