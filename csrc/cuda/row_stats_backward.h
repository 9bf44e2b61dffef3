// The launcher of the Hopper backward, free of torch so that it compiles and runs on its own (tests/csrc/cuda).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sweep_arguments.h"

namespace contrastive_ext {
namespace hopper {

struct BackwardArguments : SweepArguments {
  // lse and dL/d lse of the anchors, [n] and [m] on the device; null where a side has no term, not both
  const float *row_lse, *row_grad, *col_lse, *col_grad;
  float* workspace;  // backward_workspace floats, 16-byte aligned
  float* gradient;   // [n, features]
};

// Number of partial sums of a gradient, at most that of the column tiles, and the floats they and the columns' terms
// need.
int backward_splits(int64_t n, int64_t m, int features, int processors);
int64_t backward_workspace(int64_t n, int64_t m, int features, int splits);

// gradient_i = scale sum_j w_ij v_j (terms.h) for u [n, features], v [m, features] contiguous fp16 or bf16, 16-byte
// aligned (v == u: one set). The gradient by v is the same with the roles swapped. Returns null or what went wrong.
const char* row_stats_backward(const void* u, const void* v, int features, bool bfloat16,
                               const BackwardArguments& arguments, int splits, cudaStream_t stream);

}  // namespace hopper
}  // namespace contrastive_ext
