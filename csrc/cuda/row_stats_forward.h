// The launcher of the Hopper forward, free of torch so that it compiles and runs on its own (tests/csrc/cuda).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "partials.h"
#include "sweep_arguments.h"

namespace contrastive_ext {
namespace hopper {

struct ForwardArguments : SweepArguments {
  float* partials;  // [splits, 3, n]
};

// Number of partial results per row, hence the size of `partials`: at most that of the column tiles.
int forward_splits(int64_t n, int64_t m, int processors);

// u [n, features], v [m, features] contiguous fp16 or bf16, 16-byte aligned (v == u: one set); lse and count [n] float.
// Returns null or what went wrong.
const char* row_stats_forward(const void* u, const void* v, int features, bool bfloat16,
                              const ForwardArguments& arguments, int splits, float* lse, float* count,
                              cudaStream_t stream);

}  // namespace hopper
}  // namespace contrastive_ext
