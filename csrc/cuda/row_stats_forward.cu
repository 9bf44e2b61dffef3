// lse and count of every row over its negatives, on Hopper, and of every column where asked: the loop of main_loop.cuh
// with sums of exponentials.
//
// At 128 features tensor cores and exponential units both take about 512 cycles for the 64 x 128 logits of a turn (2 *
// 64 * 128 * 128 flops at 4096 a cycle; 64 * 128 exponentials at 16 a cycle), so neither should wait. A thread keeps
// the sums of its own logits; lanes meet only after the last tile. So even the online maximum, each thread's own, needs
// no shuffles. Columns are summed in every tile (thread_columns.h, column_sums.cuh): without a shift of the same
// exponentials, otherwise of its own.
#include "row_stats_forward.h"

#include "../exponent_range.h"
#include "column_sums.cuh"
#include "launch.cuh"
#include "main_loop.cuh"
#include "thread_rows.h"

namespace contrastive_ext {
namespace hopper {
namespace {

// Nine warps, three of them on one of the four partitions: up to 168 registers a thread (65,536 / (4 * 3 * 32), in
// steps of 8). 64 logits and what surrounds them fit (tools/cuda_gate.py).
constexpr int kThreads = kConsumers * kConsumerThreads + 32;
constexpr int kColumns = 128;  // of a tile
constexpr CE_HOST_DEVICE int64_t columns_of(TileSpan window, int64_t m) {
  const int64_t end = int64_t{window.end} * kColumns;
  return (end < m ? end : m) - int64_t{window.begin} * kColumns;
}

template <int kFeatures, bool kHasColumns>
using ForwardShape = Shape<kFeatures, kColumns, /*kVectors=*/0, kHasColumns ? kColumnParts : 0>;

// The functor of the loop: exponentials of a tile's logits join the sums of the thread's rows, and those of columns.
template <class Shape, bool kOnline>
struct AddExponentials {
  static constexpr bool kMultiplies = false, kHasColumns = Shape::kSums > 0;
  using Logits = float[Shape::kLogits];
  const ForwardArguments& arguments;
  Shared<Shape>& shared;
  const PlainGrid& work;
  int consumer, column;  // column: the thread's first of a tile
  float factor;
  MaskedTiles masked;
  ThreadRows<Shape::kLogits> rows;

  __device__ __forceinline__ void operator()(Logits& s, int tile, const void*) {
    const int64_t j0 = int64_t{tile} * kColumns;
    const bool is_masked = masked.meets(arguments.pairs, tile);
    if constexpr (kHasColumns) {
      add_both(s, tile, j0, is_masked);
    } else {
      if (is_masked)
        rows.mask(s, column, j0, arguments.pairs, arguments.m);
      else
        rows.count_all();
      rows.template add<kOnline>(s, factor);
    }
  }

  __device__ __forceinline__ void add_to_rows(const Logits& s) {
    if constexpr (kOnline)
      rows.template add<kOnline>(s, factor);
    else
      rows.add_terms(s);
  }

  __device__ __forceinline__ void add_both(Logits& s, int tile, int64_t j0, bool is_masked) {
    const int turn = tile % 2;
    if constexpr (!kOnline) rows.exponentiate(s, factor);  // for rows and columns alike
    if (is_masked) {                                       // a pair that one side alone ignores is left to the other
      const int row = work.row_tile * kRows + consumer * kConsumerRows + Fragment(threadIdx.x % kConsumerThreads).row;
      const KeptBits kept = negatives_of_columns(row, arguments.n, column, j0, arguments.pairs, arguments.m);
      leave_sums<kOnline>(shared, turn, s, factor, kept);
      leave_counts(shared, turn, kept);
      rows.mask(s, column, j0, arguments.pairs, arguments.m, ColumnSum<kOnline>::kIgnored);
      add_to_rows(s);
    } else {
      rows.count_all();
      add_to_rows(s);
      leave_sums<kOnline>(shared, turn, s, factor);
    }
    if (consumer == 0) return sums_are_left(turn);
    wait_for_sums(turn);
    const int64_t first = int64_t{arguments.window.begin} * kColumns;
    const int64_t j = j0 + column_of_place(threadIdx.x % kConsumerThreads);
    if (j < arguments.m)
      add_warps<kOnline>(shared, turn, is_masked)
          .store(arguments.column_partials, columns_of(arguments.window, arguments.m), work.row_tile, j - first);
  }
};

template <Operand kOperand, bool kOnline, class Shape>
__device__ __forceinline__ void sum_tiles(Shared<Shape>& shared, const ForwardArguments& arguments,
                                          const PlainGrid& work, float factor) {
  const int consumer = warpgroup_of_thread();
  const Fragment own(threadIdx.x % kConsumerThreads);
  const int n = static_cast<int>(arguments.n), m = static_cast<int>(arguments.m);
  const int i0 = work.row_tile * kRows + consumer * kConsumerRows;
  const auto masked_tiles = [&](int i0, int rows, int m) {
    return MaskedTiles(arguments.pairs, i0, min(i0 + rows, n), m, kColumns, work.columns.begin);
  };
  const int block = work.row_tile * kRows;
  AddExponentials<Shape, kOnline> functor{
      arguments, shared, work, consumer, own.column, factor,
      // a column is of both consumers, which have to agree; where rows are lacking, every tile needs a mask
      Shape::kSums > 0 ? masked_tiles(block, kRows, block + kRows <= n ? m : 0) : masked_tiles(i0, kConsumerRows, m),
      ThreadRows<Shape::kLogits>(i0 + own.row, n, kOnline)};
  consume<kOperand>(shared, work, consumer, functor);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowPartial& mine = functor.rows.partial[h];
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {  // the four lanes that share a row
      RowPartial other;
      other.lse.shift = __shfl_xor_sync(0xFFFFFFFF, mine.lse.shift, lane);
      other.lse.sum = __shfl_xor_sync(0xFFFFFFFF, mine.lse.sum, lane);
      other.count = __shfl_xor_sync(0xFFFFFFFF, mine.count, lane);
      mine.merge(other);
    }
    const int row = i0 + own.row + 8 * h;
    if (own.column == 0 && row < n) mine.store(arguments.partials, n, work.split, row);
  }
}

template <Operand kOperand, int kFeatures, bool kHasColumns>
__global__ void __launch_bounds__(kThreads, 1)
    row_stats_forward_kernel(const __grid_constant__ ForwardArguments arguments, const __grid_constant__ CUtensorMap u,
                             const __grid_constant__ CUtensorMap v) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  auto& shared = begin_block<ForwardShape<kFeatures, kHasColumns>>(memory);
  const PlainGrid work(arguments.window);
  if (warpgroup_of_thread() == kConsumers) {
    if (threadIdx.x % 32 == 0) produce(shared, u, v, nullptr, work);
    return;
  }
  const float factor = arguments.beta * arguments.known_scale();
  if (arguments.unit && fits_without_shift(factor * kLog2E))
    sum_tiles<kOperand, /*kOnline=*/false>(shared, arguments, work, factor);
  else
    sum_tiles<kOperand, /*kOnline=*/true>(shared, arguments, work, factor);
#else
  __trap();  // built for another architecture than sm_90a; the backend's why_not says so first
#endif
}

__global__ void merge_kernel(const float* partials, int64_t n, int splits, float* lse, float* count) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const RowPartial total = merge_splits(partials, n, splits, row);
  lse[row] = total.lse.lse(), count[row] = total.count;
}

// lse and count of `anchors` rows or columns.
void merge(const float* partials, int64_t anchors, int splits, float* lse, float* count, cudaStream_t stream) {
  constexpr int kMergeThreads = 128;
  if (anchors == 0) return;
  merge_kernel<<<number_of_tiles(anchors, kMergeThreads), kMergeThreads, 0, stream>>>(partials, anchors, splits, lse,
                                                                                      count);
}

template <Operand kOperand, int kFeatures>
struct Launch {
  template <bool kHasColumns>
  static const char* sweep(const void* u, const void* v, const ForwardArguments& arguments, int splits,
                           cudaStream_t stream) {
    return launch_sweep<ForwardShape<kFeatures, kHasColumns>, kOperand>(
        row_stats_forward_kernel<kOperand, kFeatures, kHasColumns>, kThreads, u, arguments.n, v, arguments.m, splits,
        stream, arguments);
  }
  static const char* run(const void* u, const void* v, const ForwardArguments& arguments, int splits,
                         cudaStream_t stream) {
    return arguments.column_partials ? sweep<true>(u, v, arguments, splits, stream)
                                     : sweep<false>(u, v, arguments, splits, stream);
  }
};

}  // namespace

int64_t ForwardPlan::column_partials(int64_t n, int64_t m) const {
  const int tiles_of_window = (number_of_tiles(m, kColumns) + windows - 1) / windows;
  return int64_t{number_of_tiles(n, kRows)} * kParts * tiles_of_window * kColumns;
}

ForwardPlan forward_plan(int64_t n, int64_t m, int processors, bool has_columns) {
  constexpr int kStart = 3;  // tiles of 1024 cycles
  const int row_tiles = number_of_tiles(n, kRows), column_tiles = number_of_tiles(m, kColumns);
  const int64_t bytes = int64_t{row_tiles} * kParts * m * static_cast<int64_t>(sizeof(float));
  const int windows = has_columns ? choose_windows(column_tiles, bytes) : 1;
  return {windows, choose_splits(row_tiles, column_tiles / windows, processors, kStart, processors)};
}

const char* row_stats_forward(const void* u, const void* v, int features, bool bfloat16, ForwardArguments arguments,
                              ForwardPlan plan, const ForwardResults& results, cudaStream_t stream) {
  const int64_t n = arguments.n, m = arguments.m;
  if (n == 0 || m == 0) plan = {0, 0};  // nothing to add: -inf and 0
  float* const partials = arguments.partials;
  for (int window = 0; window < plan.windows; ++window) {
    arguments.window = span_of_split(number_of_tiles(m, kColumns), plan.windows, window);
    arguments.partials = partials + int64_t{window} * plan.splits * kParts * n;
    const char* error = launch_instance<Launch>(features, bfloat16, u, v, arguments, plan.splits, stream);
    if (error) return error;
    const int64_t first = int64_t{arguments.window.begin} * kColumns;
    if (arguments.column_partials)
      merge(arguments.column_partials, columns_of(arguments.window, m), number_of_tiles(n, kRows),
            results.col_lse + first, results.col_count + first, stream);
  }
  merge(partials, n, plan.windows * plan.splits, results.lse, results.count, stream);
  if (results.col_lse && plan.windows == 0) merge(nullptr, m, 0, results.col_lse, results.col_count, stream);
  return launch_error();
}

}  // namespace hopper
}  // namespace contrastive_ext
