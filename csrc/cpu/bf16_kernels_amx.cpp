// Tile registers in hardware: AMX (amx-tile, amx-bf16), beside AVX-512. The only unit that may hold these instructions;
// bf16_choice.cpp says when it may run. The instructions are inline assembly: a register's number is a part of them,
// and a template can say it there.
#include <cstdint>
#include <cstring>

#include "bf16_product.h"

// Assemblers of these compilers' time know AMX.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define CE_HAS_AMX 1
#endif

#if defined(CE_HAS_AMX)
#define CE_REGISTERS amx
#define CE_VECTOR_BYTES 64
#define CE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"

#include "target_begin.h"

namespace contrastive_ext {
namespace amx {

struct Registers {
  // All eight are 16 rows of 64 bytes. A thread's registers are its own, and given back after every product.
  void load_configuration() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } configuration = {};
    static_assert(sizeof(configuration) == 64, "as the instruction reads it");
    configuration.palette = 1;
    for (int t = 0; t < 8; ++t)
      configuration.row_bytes[t] = kTileDepth * sizeof(uint16_t), configuration.rows[t] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int t>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  void load(const void* at, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(row_bytes), "i"(t) : "memory");
  }
  template <int t>
  void store(void* at, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(row_bytes), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

}  // namespace amx
}  // namespace contrastive_ext

#include "bf16_kernels.h"

#include "target_end.h"

namespace contrastive_ext {
namespace amx {
namespace {
const Bf16Kernels kKernels = {bf16_product, bf16_split, bf16_cut};
}
const Bf16Kernels* const kBf16Kernels = &kKernels;
}  // namespace amx
}  // namespace contrastive_ext

#else

namespace contrastive_ext {
namespace amx {
const Bf16Kernels* const kBf16Kernels = nullptr;
}
}  // namespace contrastive_ext
#endif
