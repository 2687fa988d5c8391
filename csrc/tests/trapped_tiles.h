// Runs AMX instructions on CPUs without them: each is an illegal instruction there, and the handler of that signal
// carries it out, decoded from its bytes after the encodings in Intel's Software Developer's Manual, volume 2.
// For one thread at a time.
#pragma once

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <ucontext.h>

#include "tests/amx_emulated_tiles.h"

namespace sparsifiner {
namespace {

struct TrappedTiles {
  bool configured = false;
  long products = 0;
  EmulatedTile tile[8];
};
TrappedTiles trapped;

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "FAILED: %s\n", why);
  std::_Exit(1);
}

// General registers in the order of their numbers in instructions.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

void carry_out(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  // Three bytes of VEX prefix with opcode map 0F38, W = 0, 128 bits; then opcode and ModRM.
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0)
    give_up("an illegal instruction that is none of AMX");
  const int high_x = at[1] & 0x40 ? 0 : 8, high_b = at[1] & 0x20 ? 0 : 8;
  const int source = ~(at[2] >> 3) & 15, prefix = at[2] & 3;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  const int opcode = at[3], mode = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
  at += 5;
  uint8_t* base = nullptr;
  int64_t stride = 0;
  if (mode != 3) {
    int64_t address = 0;
    int number = rm;
    if (rm == 4) {
      const int sib = *at++, index = (sib >> 3 & 7) + high_x;
      if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
      number = sib & 7;
    }
    const bool absolute = mode == 0 && number == 5;
    if (!absolute) address = registers[kRegisters[number + high_b]];
    if (mode == 1) {
      address += static_cast<int8_t>(*at++);
    } else if (mode == 2 || absolute) {
      int32_t displacement;
      std::memcpy(&displacement, at, 4);
      at += 4;
      address += displacement;
      if (absolute && rm == 5) address += reinterpret_cast<int64_t>(at);  // relative to the next instruction
    }
    base = reinterpret_cast<uint8_t*>(address);
  }
  const bool is_configuration = opcode == 0x49 && prefix == 0;
  if (!is_configuration && !trapped.configured) give_up("a tile was used before it was configured");
  if (is_configuration && mode != 3 && reg == 0) {  // LDTILECFG
    if (base[0] != 1 || base[1] != 0) give_up("the tile configuration is not of palette 1");
    for (int t = 0; t < 8; ++t)
      if (base[16 + 2 * t] != 64 || base[17 + 2 * t] != 0 || base[48 + t] != 16) give_up("a tile is not 16 x 64 bytes");
    trapped.configured = true;
    std::memset(trapped.tile, 0, sizeof trapped.tile);
  } else if (is_configuration && mode == 3 && reg == 0 && rm == 0) {  // TILERELEASE
    trapped.configured = false;
  } else if (opcode == 0x49 && prefix == 3 && mode == 3) {  // TILEZERO
    std::memset(trapped.tile[reg], 0, sizeof trapped.tile[reg]);
  } else if (opcode == 0x4b && prefix == 3 && mode != 3 && rm == 4) {  // TILELOADD
    for (int row = 0; row < 16; ++row) std::memcpy(trapped.tile[reg][row], base + row * stride, 64);
  } else if (opcode == 0x4b && prefix == 2 && mode != 3 && rm == 4) {  // TILESTORED
    for (int row = 0; row < 16; ++row) std::memcpy(base + row * stride, trapped.tile[reg][row], 64);
  } else if (opcode == 0x5c && prefix == 2 && mode == 3) {  // TDPBF16PS
    if (reg == rm || reg == source || rm == source) give_up("TDPBF16PS needs three different tiles");
    multiply_pairs(trapped.tile[reg], trapped.tile[rm], trapped.tile[source]);
    ++trapped.products;
  } else {
    give_up("an unknown AMX instruction");
  }
  registers[REG_RIP] = reinterpret_cast<greg_t>(at);
}

void trap_tiles() {
  struct sigaction action{};
  action.sa_sigaction = carry_out;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
}  // namespace sparsifiner
