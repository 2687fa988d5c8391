// Whether the AMX level may run in this process.
#pragma once

#include <string>

#include "core/kernel_table.h"

namespace sparsifiner {

// Why the CPU or the operating system does not grant AMX tiles with bfloat16 products, or "".
std::string why_no_tiles();

// Small attention and score problems in bfloat16, `tested` against `trusted`: what went wrong, or "". Both tables
// must run on this CPU.
std::string compare_kernels(const Kernels& tested, const Kernels& trusted);

}  // namespace sparsifiner
