// The tile passes for AVX2 with FMA. The target starts after every header that other code shares; the order of the
// blocks matters.
#include <cstdint>
#include <cstring>

#include "tile.h"

#if defined(__x86_64__)
#define CE_ISA avx2
#define CE_VECTOR_BYTES 32
#define CE_TARGET "avx2,fma"

#include "target_begin.h"

#include "tile_kernels.h"

#include "target_end.h"
#endif
