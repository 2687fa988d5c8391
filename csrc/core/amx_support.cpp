// AMX needs more than the CPU's word: Linux grants the tile registers to a process on request, a virtual machine may
// hide half of it, and this code was written without the hardware. So: ask all, then compare results.
#include "core/amx_support.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "core/aligned_memory.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsifiner {
namespace {

std::unique_ptr<void, decltype(&release_aligned)> aligned(std::size_t bytes) {
  return {allocate_aligned(64, (bytes + 63) / 64 * 64), &release_aligned};
}

struct Matrix {
  int width;
  std::vector<uint16_t> data;
  std::vector<const void*> rows;

  // Normal numbers in steps of 1/32, the largest magnitude of each row 127/32: exact also where scores are products of
  // bytes.
  Matrix(std::mt19937& random, int count, int width_) : width(width_), data(static_cast<std::size_t>(count * width_)) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < data.size(); ++i) {
      const float steps = i % static_cast<std::size_t>(width) == 0 ? 127.0f : std::round(32.0f * normal(random));
      const float value = std::clamp(steps, -127.0f, 127.0f) / 32.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      data[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (int i = 0; i < count; ++i) rows.push_back(data.data() + i * width);
  }
};

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::vector<uint16_t> attention(const Kernels& kernels, const Matrix& q, const Matrix& k, const Matrix& v,
                                const std::vector<float>& bias) {
  std::vector<uint16_t> out(q.data.size());
  std::vector<void*> rows;
  for (std::size_t i = 0; i < q.rows.size(); ++i) rows.push_back(out.data() + i * static_cast<std::size_t>(q.width));
  TileTask task{};
  task.dtype = task.out_dtype = DType::bfloat16;
  task.width = q.width;
  task.queries = static_cast<int>(q.rows.size());
  task.keys = static_cast<int>(k.rows.size());
  task.scale = 1.0f / std::sqrt(static_cast<float>(q.width));
  task.q = q.rows.data();
  task.k = k.rows.data();
  task.v = v.rows.data();
  task.bias = bias.data();
  task.out = rows.data();
  kernels.attend(task, aligned(kernels.attend_scratch(task)).get());
  return out;
}

// Empty where the kernel claims to have seen NaN.
std::vector<int32_t> best_keys(const Kernels& kernels, const Matrix& q, const Matrix& k, int count) {
  const int keys = static_cast<int>(k.rows.size()), block = kernels.panel_keys;
  const int blocks = (keys + block - 1) / block, step = 4 * block * kernels.key_words(DType::bfloat16, k.width);
  const auto packed = aligned(static_cast<std::size_t>(blocks * step));
  for (int i = 0; i < blocks; ++i)
    kernels.pack_keys(k.rows.data() + i * block, DType::bfloat16, std::min(block, keys - i * block), k.width,
                      static_cast<char*>(packed.get()) + i * step);
  std::vector<int32_t> indices(q.rows.size() * static_cast<std::size_t>(count));
  ScoreTask task{};
  task.dtype = DType::bfloat16;
  task.width = k.width;
  task.tiles = static_cast<int>(q.rows.size());
  task.pooled_queries = 1;
  task.candidates = keys;
  task.scale = 1.0f;
  task.packed_keys = packed.get();
  task.q = q.rows.data();
  task.count = count;
  task.indices = indices.data();
  task.out_stride = count;
  if (!kernels.score(task, aligned(kernels.score_scratch(task)).get())) indices.clear();
  return indices;
}

}  // namespace

std::string compare_kernels(const Kernels& tested, const Kernels& trusted) {
  std::mt19937 random(1);
  for (const int width : {48, 128})
    for (const int queries : {5, 32}) {
      const Matrix q(random, queries, width), k(random, 301, width), v(random, 301, width);
      std::vector<float> bias(301);
      for (std::size_t i = 0; i < bias.size(); ++i)
        bias[i] = i % 7 == 0 ? -INFINITY : 0.01f * static_cast<float>(i % 5);
      const std::vector<uint16_t> got = attention(tested, q, k, v, bias), want = attention(trusted, q, k, v, bias);
      // Values of size 4 at most count here; weights and results of both are rounded to 8 bits.
      for (std::size_t i = 0; i < got.size(); ++i)
        if (!(std::fabs(widen(got[i]) - widen(want[i])) <= 2 * 4 * 0.0078125f)) return "its attention is wrong";
      // Sums in another order may swap the last of the selected keys, rarely.
      const std::vector<int32_t> found = best_keys(tested, q, k, 40), expected = best_keys(trusted, q, k, 40);
      if (found.size() != expected.size()) return "its scores hold NaN";
      std::vector<int32_t> common;
      for (std::size_t i = 0; i < found.size(); i += 40)
        std::set_intersection(found.begin() + i, found.begin() + i + 40, expected.begin() + i,
                              expected.begin() + i + 40, std::back_inserter(common));
      if (common.size() * 50 < found.size() * 49) return "it selects wrong keys";
    }
  return "";
}

#if defined(__linux__) && defined(__x86_64__)
std::string why_no_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_tile) == 0) return "this CPU has no AMX tiles";
  if ((d & amx_bf16) == 0) return "this CPU's AMX has no bfloat16 products";
  __get_cpuid(1, &a, &b, &c, &d);
  if ((c & osxsave) == 0) return "the operating system does not manage extended registers";
  // XCR0: does the system keep the tile configuration (bit 17) and data (bit 18) of each thread?
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return "the operating system does not keep AMX registers";
  // Palette 1: eight tiles of 16 rows of 64 bytes are what the kernel configures.
  __get_cpuid_count(0x1d, 1, &a, &b, &c, &d);
  if ((b & 0xffff) < 64 || b >> 16 < 8 || (c & 0xffff) < 16) return "this CPU's AMX tiles are too few or too small";
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0)
    return "Linux did not grant AMX to this process (it needs 5.16 or later)";
  return "";
}
#else
std::string why_no_tiles() { return "AMX is used on x86-64 Linux only"; }
#endif

}  // namespace sparsifiner
