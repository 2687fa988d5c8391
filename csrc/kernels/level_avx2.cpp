// AVX2 with FMA. Compiled with flags for them; reached only where the CPU has them.
#include "kernels/table.h"
#include "simd/avx2.h"

namespace sparsifiner {

constexpr Kernels avx2_kernels = float32_kernels<Avx2, Avx2Compressor>();

}  // namespace sparsifiner
