// The tile passes for AVX-512. The target starts after every header that other code shares; the order of the blocks
// matters.
#include <cstdint>
#include <cstring>

#include "tile.h"

#if defined(__x86_64__)
#define CE_ISA avx512
#define CE_VECTOR_BYTES 64
#define CE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"

#include "target_begin.h"

#include "tile_kernels.h"

#include "target_end.h"
#endif
