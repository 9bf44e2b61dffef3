// The tile passes for the compiler's default target: SSE2 on x86-64, NEON on AArch64, plain loops elsewhere.
#include <cstdint>
#include <cstring>

#include "tile.h"

#define CE_ISA generic
#define CE_VECTOR_BYTES 16
#include "tile_kernels.h"
