// AVX-512 F, BW, DQ, VL. Compiled with flags for them; reached only where the CPU has them.
#include "kernels/table.h"
#include "simd/avx512.h"

namespace sparsifiner {

constexpr Kernels avx512_kernels = float32_kernels<Avx512, Avx512Compressor>();

}  // namespace sparsifiner
