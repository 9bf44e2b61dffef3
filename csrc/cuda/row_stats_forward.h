// The launcher of the Hopper forward, free of torch so that it compiles and runs on its own (tests/csrc/cuda).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "partials.h"
#include "sweep_arguments.h"
#include "work.h"

namespace contrastive_ext {
namespace hopper {

struct ForwardArguments : SweepArguments {
  float* partials;         // [windows * splits, 3, n]
  float* column_partials;  // [tiles of rows, 3, columns of a window], or null: no statistics of columns
  TileSpan window;         // of the column tiles, those of a launch; the launcher sets it
};

// A call is `windows` launches of `splits` splits each, as many in all as a row has partial results and at most as many
// as there are column tiles. A column has one for every tile of rows; they are merged after each window, so that its
// width bounds their memory.
struct ForwardPlan {
  int windows, splits;
  int64_t partials(int64_t n) const { return int64_t{windows} * splits * kParts * n; }  // floats
  int64_t column_partials(int64_t n, int64_t m) const;
};
ForwardPlan forward_plan(int64_t n, int64_t m, int processors, bool has_columns);

struct ForwardResults {
  float *lse, *count;          // [n]
  float *col_lse, *col_count;  // [m], or null: not wanted
};

// u [n, features], v [m, features] contiguous fp16 or bf16, 16-byte aligned (v == u: one set). Returns null or what
// went wrong.
const char* row_stats_forward(const void* u, const void* v, int features, bool bfloat16, ForwardArguments arguments,
                              ForwardPlan plan, const ForwardResults& results, cudaStream_t stream);

}  // namespace hopper
}  // namespace contrastive_ext
