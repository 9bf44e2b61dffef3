// The machine code of the AMX unit: its product must equal the model's in every bit. Where the CPU has no AMX the
// instructions raise SIGILL; a handler decodes the bytes that the compiler wrote (VEX, ModRM, SIB, displacement) and
// does on a model of the registers what they say. AMX itself may add up in another order than the model, so there
// the roundings of two sums are allowed. Exit: 0 equal, 1 not, 77 this CPU lacks AVX-512 or the compiler AMX.
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <vector>

#include "cpu/bf16_product.h"
#include "cpu/tile.h"
#include "cpu/tile_registers.h"

using namespace contrastive_ext;

namespace {

ModelRegisters registers;
int rows_of[8];  // as the configuration has them
long executed[7];
enum { kConfigure, kRelease, kZero, kLoad, kStore, kDot, kOthers };

[[noreturn]] void give_up(const uint8_t* at, const char* why) {
  fprintf(stderr, "%s:", why);
  for (int i = 0; i < 12; ++i) fprintf(stderr, " %02x", at[i]);
  fprintf(stderr, "\n");
  _exit(1);
}

int64_t general(const ucontext_t& context, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[order[number]];
}

void on_illegal(int, siginfo_t*, void* raw) {
  ucontext_t& context = *static_cast<ucontext_t*>(raw);
  const uint8_t* const start = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const uint8_t* at = start;
  if (at[0] != 0xc4) give_up(start, "no three-byte VEX prefix");
  const bool r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
  const int map = at[1] & 0x1f, vvvv = (~at[2] >> 3) & 15, prefix = at[2] & 3, opcode = at[3];
  if (map != 2 || (at[2] & 0x84) != 0) give_up(start, "not VEX.128.0F38.W0");
  const int modrm = at[4], mod = modrm >> 6, reg = (modrm >> 3) & 7, rm = modrm & 7;
  if (r) give_up(start, "a register beyond tmm7");
  at += 5;
  char* base = nullptr;
  int64_t index = 0;
  if (mod != 3) {
    int base_number = rm + 8 * b;
    bool absolute = false;
    if (rm == 4) {
      const int sib = *at++, index_number = ((sib >> 3) & 7) + 8 * x;
      base_number = (sib & 7) + 8 * b;
      absolute = (sib & 7) == 5 && mod == 0;
      if (index_number != 4) index = general(context, index_number) * (1 << (sib >> 6));
    } else if (rm == 5 && mod == 0) {
      give_up(start, "relative to the instruction pointer");
    }
    int64_t displacement = 0;
    if (mod == 1) displacement = static_cast<int8_t>(*at++);
    if (mod == 2 || absolute) {
      int32_t d;
      memcpy(&d, at, 4), at += 4;
      displacement = d;
    }
    base = reinterpret_cast<char*>((absolute ? 0 : general(context, base_number)) + displacement);
  }
  if (opcode == 0x49 && prefix == 0 && mod != 3) {
    const uint8_t* configuration = reinterpret_cast<const uint8_t*>(base + index);
    if (configuration[0] != 1 || configuration[1] != 0) give_up(start, "palette 1 from row 0 was expected");
    for (int t = 0; t < 8; ++t) {
      uint16_t bytes;
      memcpy(&bytes, configuration + 16 + 2 * t, 2);
      rows_of[t] = configuration[48 + t];
      registers.configure(t, rows_of[t], bytes);
    }
    ++executed[kConfigure];
  } else if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) {
    for (int t = 0; t < 8; ++t) registers.configure(t, rows_of[t] = 0, 0);
    ++executed[kRelease];
  } else if (opcode == 0x49 && prefix == 3 && mod == 3 && rm == 0) {
    registers.zero(reg), ++executed[kZero];
  } else if (opcode == 0x4b && prefix == 3 && mod != 3 && rm == 4) {
    registers.load(reg, base, index), ++executed[kLoad];
  } else if (opcode == 0x4b && prefix == 2 && mod != 3 && rm == 4) {
    registers.store(reg, base, index), ++executed[kStore];
  } else if (opcode == 0x5c && prefix == 2 && mod == 3) {
    if (rows_of[reg] == 0 || reg == rm || reg == vvvv || rm == vvvv) give_up(start, "operands that fault");
    registers.dot(reg, rm, vvvv), ++executed[kDot];
  } else {
    give_up(start, "an instruction that is not AMX");
  }
  context.uc_mcontext.gregs[REG_RIP] += at - start;
}

struct Case {
  int64_t rows, cols, depth;
  Bf16Terms terms;
  bool accumulate;
};

bool equal(const Case& x, bool hardware) {
  const auto whole = [](int64_t n) { return (n + kTileBlock - 1) / kTileBlock * kTileBlock; };
  const int64_t depth = whole(x.depth), panel = kTileRows * depth, c_row = x.cols + 3;
  std::vector<uint16_t> a(kParts * whole(x.rows) * depth), b(kParts * whole(x.cols) * depth);
  for (auto* matrix : {&a, &b})
    for (uint16_t& y : *matrix) y = static_cast<uint16_t>((rand() & 0x8000) | (0x3d00 + rand() % 0x300));
  std::vector<float> ours(x.rows * c_row, 0.25f), expected = ours;
  for (const auto& [c, kernels] : {std::pair(&ours, amx::kBf16Kernels), std::pair(&expected, amx_model::kBf16Kernels)})
    kernels->product({c->data(), c_row, a.data(), depth, whole(x.rows) * depth, b.data(), panel, whole(x.cols) * depth,
                      x.terms, x.rows, x.cols, x.depth, x.accumulate ? 0.5f : 1.5f, x.accumulate});
  if (!hardware) return memcmp(ours.data(), expected.data(), ours.size() * sizeof(float)) == 0;
  const float terms = static_cast<float>(x.terms.count * depth), largest = 4 * terms + 1;  // every number is below 2
  for (size_t i = 0; i < ours.size(); ++i)
    if (!(fabsf(ours[i] - expected[i]) <= 2 * terms * 0x1p-24f * largest)) return false;
  return true;
}

}  // namespace

int main() {
  if (!amx::kBf16Kernels || strcmp(chosen_isa().name, "avx512") != 0) return 77;
  const bool hardware = choose_bf16("amx");
  if (!hardware) {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal, action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }
  for (const Case& x :
       {Case{32, 32, 32, kWhole, false}, Case{1, 1, 1, kWhole, false}, Case{45, 41, 83, kOfWeight, true},
        Case{70, 100, 128, kWhole, false}, Case{17, 33, 64, kOfWeight, false}, Case{45, 41, 83, kOfBoth, true},
        Case{33, 70, 96, kSymmetric, false}})
    if (!equal(x, hardware)) return printf("differs: %ld x %ld x %ld\n", long(x.rows), long(x.cols), long(x.depth)), 1;
  if (!multiplies_like_the_model(*amx::kBf16Kernels)) return printf("the check of the first use fails\n"), 1;
  uint16_t parts[2][kParts * 3];
  const float numbers[3] = {1.0f / 3, -3e-5f, 16777215.0f};
  amx::kBf16Kernels->cut(numbers, 3, 0.5f, parts[0]), amx_model::kBf16Kernels->cut(numbers, 3, 0.5f, parts[1]);
  if (memcmp(parts[0], parts[1], sizeof(parts[0])) != 0) return printf("the cut differs\n"), 1;
  if (hardware) return printf("on AMX\n"), 0;
  printf("interpreted: %ld configurations, %ld releases, %ld products\n", executed[kConfigure], executed[kRelease],
         executed[kDot]);
  return executed[kConfigure] != executed[kRelease] || executed[kStore] != executed[kZero];
}
