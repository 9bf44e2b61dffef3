// chosen_isa() of csrc/cpu/isa.cpp without its kernels, which take long to compile: tests that only ask for the name.
#include "cpu/tile.h"

namespace contrastive_ext {

const Isa& chosen_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("fma");
#else
  static const bool avx512 = false;
#endif
  static const Isa isa{avx512 ? "avx512" : "another", true, nullptr, nullptr};
  return isa;
}

}  // namespace contrastive_ext
