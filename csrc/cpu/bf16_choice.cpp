// Whether products of bf16 operands run on AMX: asked once of the compiler, the CPU, the kernel, and of the products
// themselves. No machine with AMX has run them before a release: the first use on one compares a small random block
// with the model, and keeps away from instructions that do not give it.
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "bf16_product.h"
#include "tile.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace contrastive_ext {
namespace {

// A block of ragged size in the layout of Bf16Product, of three parts.
struct Block {
  static constexpr int64_t kRows = 45, kCols = 41, kDepth = 83, kPaddedRows = 64, kPaddedDepth = 96;
  std::vector<uint16_t> a, b;

  // Small integers make sums that are exact in any order; otherwise numbers of all magnitudes between 2^-6 and 2.
  explicit Block(bool integers) : a(kParts * kPaddedRows * kPaddedDepth), b(kPaddedRows * kPaddedDepth) {
    uint64_t state = 88172645463325252u;
    const auto draw = [&] {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      const float small = static_cast<float>(static_cast<int64_t>(state >> 40) % 17 - 8);
      const uint32_t wide = static_cast<uint32_t>((state >> 20) & 0x8000) | (0x3c80u + (state >> 8) % 0x380u);
      uint32_t bits;
      memcpy(&bits, &small, sizeof(bits));
      return static_cast<uint16_t>(integers ? bits >> 16 : wide);
    };
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < kRows; ++i)
        for (int64_t k = 0; k < kDepth; ++k) a[(part * kPaddedRows + i) * kPaddedDepth + k] = draw();
    for (uint16_t& x : b) x = draw();
  }

  std::vector<float> multiply(const Bf16Kernels& kernels, const std::vector<uint16_t>& left,
                              const std::vector<uint16_t>& right) const {
    std::vector<float> c(kRows * kCols, 1.0f);
    kernels.product({c.data(), kCols, left.data(), kPaddedDepth, kPaddedRows * kPaddedDepth, right.data(),
                     kTileRows * kPaddedDepth,
                     /*b_part=*/0, kOfWeight, kRows, kCols, kDepth, 0.5f, /*accumulate=*/true});
    return c;
  }
  std::vector<float> multiply(const Bf16Kernels& kernels) const { return multiply(kernels, a, b); }
  // Sums of the magnitudes.
  std::vector<float> sizes(const Bf16Kernels& kernels) const {
    std::vector<uint16_t> left = a, right = b;
    for (uint16_t& x : left) x &= 0x7fff;
    for (uint16_t& x : right) x &= 0x7fff;
    return multiply(kernels, left, right);
  }
};

#if defined(__x86_64__) && defined(__linux__)
// Null, or why this CPU or this kernel has no tile registers for us.
const char* why_no_registers() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0)
    return "this CPU has no AMX (amx_tile, amx_bf16)";
  if (strcmp(chosen_isa().name, "avx512") != 0) return "this CPU or its kernel offers AMX without AVX-512";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "the kernel does not permit AMX (arch_prctl, ARCH_REQ_XCOMP_PERM)";
  return nullptr;
}
#else
const char* why_no_registers() { return "AMX needs Linux on x86-64"; }
#endif

Bf16Choice widened(const char* reason) { return {nullptr, "widened", reason}; }

const Bf16Choice& best() {
  static const Bf16Choice choice = [] {
    const char* reason = why_no_registers();
    if (!reason && !amx::kBf16Kernels) reason = "the library was built by a compiler that does not know AMX";
    if (!reason && !multiplies_like_the_model(*amx::kBf16Kernels))
      reason = "AMX of this CPU failed the comparison with the model of its instructions; please report it";
    return reason ? widened(reason) : Bf16Choice{amx::kBf16Kernels, "amx", ""};
  }();
  return choice;
}

enum Wish { kBest, kModel, kWidened };
std::atomic<Wish> wish{kBest};

}  // namespace

bool multiplies_like_the_model(const Bf16Kernels& kernels) {
  const Bf16Kernels& model = *amx_model::kBf16Kernels;
  const Block exact(/*integers=*/true), rounded(/*integers=*/false);
  if (exact.multiply(kernels) != exact.multiply(model)) return false;
  const std::vector<float> ours = rounded.multiply(kernels), expected = rounded.multiply(model),
                           sizes = rounded.sizes(model);
  // two orders of one sum differ by at most twice the roundings of one
  constexpr float kAllowed = 2 * kParts * Block::kPaddedDepth * 0x1p-24f;
  for (size_t i = 0; i < ours.size(); ++i)
    if (!(std::fabs(ours[i] - expected[i]) <= kAllowed * sizes[i])) return false;
  return true;
}

Bf16Choice chosen_bf16() {
  switch (wish.load()) {
    case kModel:
      return {amx_model::kBf16Kernels, "model", ""};
    case kWidened:
      return widened("it was asked for");
    default:
      return best();
  }
}

bool choose_bf16(const char* name) {
  if (strcmp(name, "auto") == 0 || (strcmp(name, "amx") == 0 && best().kernels))
    wish = kBest;
  else if (strcmp(name, "model") == 0)
    wish = kModel;
  else if (strcmp(name, "widened") == 0)
    wish = kWidened;
  else
    return false;
  return true;
}

}  // namespace contrastive_ext
