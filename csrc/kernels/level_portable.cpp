// Any CPU, through the compilers' generic vectors of four floats: SSE2 on x86-64, NEON on arm64.
#include "kernels/table.h"
#include "simd/portable.h"
#include "simd/scalar_compressor.h"

namespace sparsifiner {

constexpr Kernels portable_kernels = float32_kernels<PortableVector<4>, ScalarCompressor>();

}  // namespace sparsifiner
