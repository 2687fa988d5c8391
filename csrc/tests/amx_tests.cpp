// Tests of the AMX level that need no AMX: the emulated tile unit, the self-check that admits the level, and, on
// Linux, the level's own machine code with its tile instructions trapped and carried out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/amx_support.h"
#include "core/kernel_table.h"
#include "core/sparsifiner.h"
#include "tests/amx_emulated_tiles.h"

#if defined(__linux__) && defined(__x86_64__) && defined(SPARSIFINER_AMX)
#include "tests/trapped_tiles.h"
#define CAN_TRAP_TILES
#endif

namespace sparsifiner {
namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

uint32_t pair(float even, float odd) { return to_bits(even) >> 16 | (to_bits(odd) & 0xffff0000); }

// One product and sum of the emulated unit: c + even * right_even + odd * right_odd.
float product(float c, float even, float odd, float right_even, float right_odd) {
  static EmulatedTile sum, left, right;
  std::memset(left, 0, sizeof left);
  std::memset(right, 0, sizeof right);
  sum[3][5] = to_bits(c);
  left[3][7] = pair(even, odd);
  right[7][5] = pair(right_even, right_odd);
  multiply_pairs(sum, left, right);
  return from_bits(sum[3][5]);
}

void test_emulated_unit() {
  const float tiny = from_bits(0x00400000), smallest = from_bits(0x00800000);  // a denormal, the least normal number
  expect(product(1.0f, 2.0f, 3.0f, 5.0f, 7.0f) == 32.0f, "pairs are multiplied and added");
  expect(product(0.0f, tiny, 0.0f, 1024.0f, 0.0f) == 0.0f, "denormal factors count as zero");
  expect(product(tiny, 0.0f, 0.0f, 0.0f, 0.0f) == 0.0f, "a denormal sum counts as zero");
  expect(product(0.0f, smallest, 0.0f, 0.5f, 0.0f) == 0.0f, "a denormal result becomes zero");
  // Halfway between two float32 the even one is taken: 1 + 2^-24 and 1 + 3 * 2^-24.
  expect(product(1.0f, 0x1p-12f, 0.0f, 0x1p-12f, 0.0f) == 1.0f, "ties go down to even");
  expect(product(1.0f, 0x1.8p-11f, 0.0f, 0x1p-12f, 0.0f) == 1.0f + 0x1p-22f, "ties go up to even");
  // The pair is summed before it meets the old value: separately each half would be rounded away.
  expect(product(1.0f, 0x1p-12f, 0x1p-12f, 0x1p-12f, 0x1p-12f) == 1.0f + 0x1p-23f, "the pair is summed first");
}

void wrong_attend(const TileTask& task, void* scratch) {
  amx_emulated_kernels.attend(task, scratch);
  static_cast<uint16_t*>(task.out[task.queries - 1])[task.width - 1] ^= 0x8000;
}

bool wrong_score(const ScoreTask& task, void* scratch) {
  ScoreTask flipped = task;
  flipped.scale = -task.scale;
  return amx_emulated_kernels.score(flipped, scratch);
}

bool failing_score(const ScoreTask&, void*) { return false; }

void test_self_check() {
  expect(compare_kernels(amx_emulated_kernels, portable_kernels) == "", "right kernels pass the self-check");
  Kernels broken = amx_emulated_kernels;
  broken.attend = wrong_attend;
  expect(compare_kernels(broken, portable_kernels) == "its attention is wrong", "one wrong sign is noticed");
  broken = amx_emulated_kernels;
  broken.score = wrong_score;
  expect(compare_kernels(broken, portable_kernels) == "it selects wrong keys", "wrong scores are noticed");
  broken.score = failing_score;
  expect(compare_kernels(broken, portable_kernels) == "its scores hold NaN", "failing scores are noticed");
}

#if defined(CAN_TRAP_TILES)
void test_machine_code() {
  if (!why_not(Level::avx512bf16).empty()) {
    std::printf("the AMX level's machine code was not run: %s\n", why_not(Level::avx512bf16).c_str());
    return;
  }
  const bool hardware = why_no_tiles().empty();
  if (!hardware) trap_tiles();
  const std::string wrong = compare_kernels(amx_kernels, avx512bf16_kernels);
  expect(wrong.empty(), ("the AMX level's machine code: " + wrong).c_str());
  expect(hardware || trapped.products > 1000, "tile products were carried out");
  expect(!trapped.configured, "the tiles are released");
  std::printf("the AMX level's machine code ran on %s\n", hardware ? "the CPU's tiles" : "trapped instructions");
}
#endif

}  // namespace
}  // namespace sparsifiner

int main() {
  using namespace sparsifiner;
  test_emulated_unit();
  test_self_check();
#if defined(CAN_TRAP_TILES)
  test_machine_code();
#endif
  if (failures == 0) std::printf("all AMX tests passed\n");
  return failures == 0 ? 0 : 1;
}
