// Sums of a tile's columns over the rows of a block: lanes of a warp meet by shuffles, warps in shared memory. The
// first consumer leaves what its warps have and goes on; the second one waits for it, adds up all eight warps in their
// order and stores a partial result of the block.
//
// Two buffers by turns are enough: the first consumer comes to a tile after the next only when the second one has begun
// the next, whose turn it gave on after adding up this one.
#pragma once

#include "main_loop.cuh"
#include "thread_columns.h"

namespace contrastive_ext {
namespace hopper {

enum ColumnPart { kSum, kCount, kShift, kColumnParts };

__device__ __forceinline__ ColumnSum<false> exchange(const ColumnSum<false>& x, int lane) {
  return {__shfl_xor_sync(0xFFFFFFFF, x.sum, lane)};
}
__device__ __forceinline__ ColumnSum<true> exchange(const ColumnSum<true>& x, int lane) {
  return {__shfl_xor_sync(0xFFFFFFFF, x.sum, lane), __shfl_xor_sync(0xFFFFFFFF, x.shift, lane)};
}

template <class Sum>
__device__ __forceinline__ Sum share(const Sum& lower, const Sum& upper, int lanes) {
  const Shares<Sum> shares(lower, upper, threadIdx.x & lanes);
  Sum sum = shares.kept;
  sum.merge(exchange(shares.given, lanes));
  return sum;
}

// The lane's four sums from its 32, sum(bit), and those of the seven lanes with the same columns.
template <class Sum>
struct LaneSums {
  Sum x[kSumsOfThread / 2];
  template <class Function>
  __device__ __forceinline__ explicit LaneSums(const Function& sum) {
#pragma unroll
    for (int k = 0; k < 16; ++k) x[k] = share<Sum>(sum(k), sum(k + 16), 16);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = share<Sum>(x[k], x[k + 8], 8);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = share<Sum>(x[k], x[k + 4], 4);
  }
};

// Where a warp leaves what its lanes have of a tile; `turn` is the tile's number modulo 2.
template <class Shape>
__device__ __forceinline__ float4& place_of_lane(Shared<Shape>& shared, int turn, ColumnPart part) {
  return reinterpret_cast<float4&>(shared.sums[turn][part][threadIdx.x / 32][threadIdx.x % 32 * kSumsOfLane]);
}

template <bool kOnline, class Shape, class Kept = AllKept>
__device__ __forceinline__ void leave_sums(Shared<Shape>& shared, int turn, const float (&s)[Shape::kLogits],
                                           float factor, const Kept& kept = {}) {
  const LaneSums<ColumnSum<kOnline>> sums([&](int bit) { return sum_of_rows<kOnline>(s, factor, kept, bit); });
  const auto& x = sums.x;
  place_of_lane(shared, turn, kSum) = make_float4(x[0].sum, x[1].sum, x[2].sum, x[3].sum);
  if constexpr (kOnline)
    place_of_lane(shared, turn, kShift) = make_float4(x[0].shift, x[1].shift, x[2].shift, x[3].shift);
}

// Of a tile that needs a mask; in any other every row counts.
template <class Shape>
__device__ __forceinline__ void leave_counts(Shared<Shape>& shared, int turn, const KeptBits& kept) {
  const LaneSums<ColumnSum<false>> counts([&](int bit) { return count_of_rows(kept, bit); });
  const auto& x = counts.x;
  place_of_lane(shared, turn, kCount) = make_float4(x[0].sum, x[1].sum, x[2].sum, x[3].sum);
}

// The second consumer's threads, one for each column: what the block has of the column at column_of_place.
template <bool kOnline, class Shape>
__device__ __forceinline__ RowPartial add_warps(const Shared<Shape>& shared, int turn, bool is_masked) {
  const auto of = [&](ColumnPart part, int warp) {
    return shared.sums[turn][part][warp][threadIdx.x % kConsumerThreads];
  };
  ColumnSum<kOnline> sum;
  float count = is_masked ? 0 : kRows;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    ColumnSum<kOnline> more{of(kSum, warp)};
    if constexpr (kOnline) more.shift = of(kShift, warp);
    if (warp == 0)
      sum = more;
    else
      sum.merge(more);
  }
  if (is_masked)
    for (int warp = 0; warp < kWarps; ++warp) count += of(kCount, warp);
  return {sum.lse(), count};
}

}  // namespace hopper
}  // namespace contrastive_ext
