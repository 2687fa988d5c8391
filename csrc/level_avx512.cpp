// AVX-512 F, BW, DQ, VL. Compiled with flags for them; reached only where the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace sparsifiner {
namespace {
#include "attend_kernel.h"
#include "level_avx512_vector.h"
#include "topk_kernel.h"

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Avx512, Mode::plain>(task, memory);
  else
    attend_tile<Avx512, Mode::convert>(task, memory);
}
}  // namespace

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {attend_scratch, attend, select_topk<Avx512Compressor>, add_rows, store_row};

}  // namespace sparsifiner
