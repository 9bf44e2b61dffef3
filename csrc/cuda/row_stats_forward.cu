// lse and count of every row over its negatives, on Hopper: the loop of main_loop.cuh with sums of exponentials.
//
// At 128 features tensor cores and exponential units both take about 512 cycles for the 64 x 128 logits of a turn (2 *
// 64 * 128 * 128 flops at 4096 a cycle; 64 * 128 exponentials at 16 a cycle), so neither should wait. A thread keeps
// the sums of its own logits; lanes meet only after the last tile. So even the online maximum, each thread's own, needs
// no shuffles.
#include "row_stats_forward.h"

#include "../exponent_range.h"
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
template <int kFeatures>
using ForwardShape = Shape<kFeatures, kColumns>;

// The functor of the loop: exponentials of a tile's logits join the sums of the thread's rows.
template <int kLogits, bool kOnline>
struct AddExponentials {
  static constexpr bool kMultiplies = false;
  const ForwardArguments& arguments;
  int column;  // the thread's first of a tile
  float factor;
  MaskedTiles masked;
  ThreadRows<kLogits> rows;

  __device__ __forceinline__ void operator()(float (&s)[kLogits], int tile, const void*) {
    if (masked.meets(arguments.pairs, tile))
      rows.mask(s, column, int64_t{tile} * kColumns, arguments.pairs, arguments.m);
    else
      rows.count_all();
    rows.template add<kOnline>(s, factor);
  }
};

template <Operand kOperand, bool kOnline, class Shape>
__device__ __forceinline__ void sum_rows(Shared<Shape>& shared, const ForwardArguments& arguments,
                                         const PlainGrid& work, float factor) {
  const int consumer = warpgroup_of_thread();
  const Fragment own(threadIdx.x % kConsumerThreads);
  const int n = static_cast<int>(arguments.n), m = static_cast<int>(arguments.m);
  const int i0 = work.row_tile * kRows + consumer * kConsumerRows;
  AddExponentials<Shape::kLogits, kOnline> functor{
      arguments, own.column, factor,
      MaskedTiles(arguments.pairs, i0, min(i0 + kConsumerRows, n), m, kColumns, work.columns.begin),
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

template <Operand kOperand, int kFeatures>
__global__ void __launch_bounds__(kThreads, 1)
    row_stats_forward_kernel(const __grid_constant__ ForwardArguments arguments, const __grid_constant__ CUtensorMap u,
                             const __grid_constant__ CUtensorMap v) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  auto& shared = begin_block<ForwardShape<kFeatures>>(memory);
  const PlainGrid work(number_of_tiles(arguments.m, kColumns));
  if (warpgroup_of_thread() == kConsumers) {
    if (threadIdx.x % 32 == 0) produce(shared, u, v, nullptr, work);
    return;
  }
  const float factor = arguments.beta * arguments.known_scale();
  if (arguments.unit && fits_without_shift(factor * kLog2E))
    sum_rows<kOperand, /*kOnline=*/false>(shared, arguments, work, factor);
  else
    sum_rows<kOperand, /*kOnline=*/true>(shared, arguments, work, factor);
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

template <Operand kOperand, int kFeatures>
struct Launch {
  static const char* run(const void* u, const void* v, const ForwardArguments& arguments, int splits,
                         cudaStream_t stream) {
    return launch_sweep<ForwardShape<kFeatures>, kOperand>(row_stats_forward_kernel<kOperand, kFeatures>, kThreads, u,
                                                           arguments.n, v, arguments.m, splits, stream, arguments);
  }
};

}  // namespace

int forward_splits(int64_t n, int64_t m, int processors) {
  constexpr int kStart = 3;  // tiles of 1024 cycles
  return choose_splits(number_of_tiles(n, kRows), number_of_tiles(m, kColumns), processors, kStart, processors);
}

const char* row_stats_forward(const void* u, const void* v, int features, bool bfloat16,
                              const ForwardArguments& arguments, int splits, float* lse, float* count,
                              cudaStream_t stream) {
  if (arguments.n == 0) return nullptr;
  if (arguments.m == 0) splits = 0;  // nothing to add: -inf and 0
  const char* error = nullptr;
  if (splits > 0) error = launch_instance<Launch>(features, bfloat16, u, v, arguments, splits, stream);
  if (error) return error;
  constexpr int kMergeThreads = 128;
  merge_kernel<<<number_of_tiles(arguments.n, kMergeThreads), kMergeThreads, 0, stream>>>(
      arguments.partials, arguments.n, splits, lse, count);
  return launch_error();
}

}  // namespace hopper
}  // namespace contrastive_ext
