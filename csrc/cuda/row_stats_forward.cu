// lse and count of every row over its negatives, on Hopper, for 128 features.
//
// A block owns 128 rows and one split of the column tiles. Warp 8 has TMA fill a ring of column tiles; warps 0-3 and
// 4-7 are two consumer warpgroups with 64 rows each, which take turns (ping-pong): while one has its tile multiplied,
// the other turns its logits into exponentials and sums. At 128 features both take about 512 cycles for 64 x 128 logits
// (tensor cores: 2 * 64 * 128 * 128 flops at 4096 a cycle; exp2: 64 * 128 at 16 a cycle), so neither should wait.
//
// A thread keeps the sums of its own logits, 32 of each of two rows per tile; lanes meet only after the last tile. So
// even the online maximum, each thread's own, needs no shuffles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../exponent_range.h"
#include "mbarrier.cuh"
#include "partials.h"
#include "ring.h"
#include "row_stats_forward.h"
#include "shared_layout.h"
#include "tensor_map.h"
#include "thread_rows.h"
#include "tma.cuh"
#include "wgmma.cuh"
#include "work.h"

namespace contrastive_ext {
namespace hopper {
namespace {

constexpr int kTile = 128;  // rows of a block, and columns of a tile
constexpr int kConsumers = 2, kConsumerThreads = 128;
// unused in builds for other architectures, which have no kernel
[[maybe_unused]] constexpr int kConsumerRows = kTile / kConsumers;
[[maybe_unused]] constexpr int kProducerWarp = kConsumers * kConsumerThreads / 32;
// Nine warps, three of them on one of the four partitions: up to 168 registers a thread (65,536 / (4 * 3 * 32), in
// steps of 8). 64 logits and what surrounds them fit (tools/cuda_gate.py), so no registers are handed over (setmaxnreg)
// yet.
constexpr int kThreads = kConsumers * kConsumerThreads + 32;
constexpr int kTileBytes = kTile * kFeatures * 2;
constexpr int kStages = 4;  // a tile lasts two turns, 1024 cycles or more: three ahead cover the latency of memory

struct Shared {
  uint8_t rows[kTileBytes];
  uint8_t columns[kStages][kTileBytes];
  uint64_t rows_full, full[kStages], empty[kStages];
};
static_assert(kTileBytes % kAtomBytes == 0, "every tile starts an atom");
constexpr int kSharedBytes = sizeof(Shared) + kAtomBytes;  // room to align the first tile

// One lane of the producer warp: the rows once, then column tiles as stages become empty.
[[maybe_unused]] __device__ __forceinline__ void produce(Shared& shared, const CUtensorMap& u, const CUtensorMap& v,
                                                         TileSpan span) {
  arrive_expecting(shared.rows_full, kTileBytes);
  load_tile<kFeatures, kTile>(shared.rows, u, static_cast<int>(blockIdx.x) * kTile, shared.rows_full);
  RingPosition<kStages> at;
  for (int tile = span.begin; tile < span.end; ++tile, at.advance()) {
    wait(shared.empty[at.stage], at.empty_parity());
    arrive_expecting(shared.full[at.stage], kTileBytes);
    load_tile<kFeatures, kTile>(shared.columns[at.stage], v, tile * kTile, shared.full[at.stage]);
  }
}

template <Operand kOperand, bool kOnline>
__device__ __forceinline__ void consume(Shared& shared, const ForwardArguments& arguments, TileSpan span,
                                        float factor) {
  const int consumer = threadIdx.x / kConsumerThreads;
  const Fragment own(threadIdx.x % kConsumerThreads);
  const int64_t i0 = int64_t{blockIdx.x} * kTile + consumer * kConsumerRows;
  const int64_t i1 = i0 + kConsumerRows < arguments.n ? i0 + kConsumerRows : arguments.n;
  const uint64_t a = matrix_descriptor(shared_address(shared.rows) + consumer * kConsumerRows * 128);
  const uint64_t b = matrix_descriptor(shared_address(shared.columns));
  ThreadRows rows(i0 + own.row, arguments.n, kOnline);
  RingPosition<kStages> at;
  wait(shared.rows_full, 0);
  if (gives_first_turn(consumer)) give_turn(1 - consumer);
  for (int tile = span.begin; tile < span.end; ++tile, at.advance()) {
    float s[kFragment];
    wait(shared.full[at.stage], at.full_parity());
    wait_for_turn(consumer);
    issue_products<kOperand, kFeatures, kTile, kTile>(s, a, b + descriptor_offset(at.stage * kTileBytes));
    if (gives_turn(consumer, tile + 1 == span.end)) give_turn(1 - consumer);
    const int64_t j0 = int64_t{tile} * kTile;
    const bool plain = !arguments.pairs.has_ids() && j0 + kTile <= arguments.m &&
                       !arguments.pairs.may_share_image(i0, i1, j0, j0 + kTile);
    wait_for_products(s);
    if (threadIdx.x % 32 == 0) arrive(shared.empty[at.stage]);
    if (plain)
      rows.count_all();
    else
      rows.mask(s, own.column, j0, arguments.pairs, arguments.m);
    rows.add<kOnline>(s, factor);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowPartial& mine = rows.partial[h];
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {  // the four lanes that share a row
      RowPartial other;
      other.lse.shift = __shfl_xor_sync(0xFFFFFFFF, mine.lse.shift, lane);
      other.lse.sum = __shfl_xor_sync(0xFFFFFFFF, mine.lse.sum, lane);
      other.count = __shfl_xor_sync(0xFFFFFFFF, mine.count, lane);
      mine.merge(other);
    }
    const int64_t row = i0 + own.row + 8 * h;
    if (own.column == 0 && row < arguments.n) mine.store(arguments.partials, arguments.n, blockIdx.y, row);
  }
}

template <Operand kOperand>
__global__ void __launch_bounds__(kThreads, 1)
    row_stats_forward_kernel(const __grid_constant__ ForwardArguments arguments, const __grid_constant__ CUtensorMap u,
                             const __grid_constant__ CUtensorMap v) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes);
  if (threadIdx.x == 0) {
    init_barrier(shared.rows_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full[stage], 1);                                    // the producer; TMA adds its bytes
      init_barrier(shared.empty[stage], kConsumers * kConsumerThreads / 32);  // every warp reads every column
    }
    publish_barriers();
  }
  __syncthreads();
  const int column_tiles = static_cast<int>((arguments.m + kTile - 1) / kTile);
  const TileSpan span = span_of_split(column_tiles, gridDim.y, blockIdx.y);
  if (threadIdx.x / 32 == kProducerWarp) {
    if (threadIdx.x % 32 == 0) produce(shared, u, v, span);
    return;
  }
  const float factor = arguments.beta * (arguments.scale_tensor ? *arguments.scale_tensor : arguments.scale);
  if (arguments.unit && fits_without_shift(factor * kLog2E))
    consume<kOperand, /*kOnline=*/false>(shared, arguments, span, factor);
  else
    consume<kOperand, /*kOnline=*/true>(shared, arguments, span, factor);
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

template <Operand kOperand>
cudaError_t launch(const ForwardArguments& arguments, const CUtensorMap& u, const CUtensorMap& v, dim3 grid,
                   cudaStream_t stream) {
  const auto kernel = row_stats_forward_kernel<kOperand>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, kSharedBytes, stream>>>(arguments, u, v);
  return cudaGetLastError();
}

int tiles(int64_t rows) { return static_cast<int>((rows + kTile - 1) / kTile); }

}  // namespace

int forward_splits(int64_t n, int64_t m, int processors) { return choose_splits(tiles(n), tiles(m), processors); }

const char* row_stats_forward(const void* u, const void* v, bool bfloat16, const ForwardArguments& arguments,
                              int splits, float* lse, float* count, cudaStream_t stream) {
  if (arguments.n == 0) return nullptr;
  if (arguments.m > 0) {
    CUtensorMap u_map, v_map;
    const char* error = describe_matrix(&u_map, u, arguments.n, kFeatures, bfloat16, kTile);
    if (!error) error = describe_matrix(&v_map, v, arguments.m, kFeatures, bfloat16, kTile);
    if (error) return error;
    const dim3 grid(tiles(arguments.n), splits);
    const cudaError_t status = bfloat16 ? launch<Operand::kBfloat16>(arguments, u_map, v_map, grid, stream)
                                        : launch<Operand::kHalf>(arguments, u_map, v_map, grid, stream);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  } else {
    splits = 0;  // nothing to add: -inf and 0
  }
  constexpr int kMergeThreads = 128;
  const int64_t blocks = (arguments.n + kMergeThreads - 1) / kMergeThreads;
  merge_kernel<<<static_cast<int>(blocks), kMergeThreads, 0, stream>>>(arguments.partials, arguments.n, splits, lse,
                                                                       count);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace hopper
}  // namespace contrastive_ext
