// Which compiled instruction set runs: asked once of the CPU, the same for every call of the process.
#include "tile.h"

namespace contrastive_ext {

#if defined(__x86_64__)
namespace avx512 {
extern const TileKernels<float> kKernelsF32;
extern const TileKernels<double> kKernelsF64;
}  // namespace avx512
namespace avx2 {
extern const TileKernels<float> kKernelsF32;
extern const TileKernels<double> kKernelsF64;
}  // namespace avx2
#endif
namespace generic {
extern const TileKernels<float> kKernelsF32;
extern const TileKernels<double> kKernelsF64;
}  // namespace generic

const Isa* compiled_isas(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // some compilers' run-time libraries do not fill the table before this
#endif
  static const Isa isas[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"),
       &avx512::kKernelsF32, &avx512::kKernelsF64},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kKernelsF32, &avx2::kKernelsF64},
#endif
      {"generic", true, &generic::kKernelsF32, &generic::kKernelsF64},
  };
  *count = static_cast<int>(sizeof(isas) / sizeof(isas[0]));
  return isas;
}

const Isa& chosen_isa() {
  static const Isa* const chosen = [] {
    int count = 0;
    const Isa* isa = compiled_isas(&count);
    while (!isa->usable) ++isa;
    return isa;
  }();
  return *chosen;
}

}  // namespace contrastive_ext
