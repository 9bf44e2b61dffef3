// The loop of every sweep over rows that stay in shared memory.
//
// One warp has TMA fill a ring of column tiles; warps 0-3 and 4-7 are two consumer warpgroups with 64 rows each, which
// take turns (ping-pong): while one has its tile multiplied, the other makes exponentials of its logits. A turn is
// given on when its last products begin: products of both that wait in the tensor cores at once would be over at once,
// and the exponentials of both would come after them (docs/measurements.md). What a thread does with its logits of a
// tile is a functor:
//
//   functor(s, tile, vectors)   s are the thread's logits of column tile `tile`, before the scale (see Fragment);
//                               `vectors` [kVectors][kColumns] in shared memory came with the tile
//   kMultiplies                 false: nothing more. true: the functor leaves 16-bit weights in `w`, and the loop adds
//                               their product with the tile to the sums `o`
#pragma once

#include <cuda.h>

#include "mbarrier.cuh"
#include "ring.h"
#include "shape.h"
#include "tma.cuh"
#include "wgmma.cuh"
#include "work.h"

namespace contrastive_ext {
namespace hopper {

// The shared memory of a block with its barriers, ready for all threads.
template <class Shape>
__device__ __forceinline__ Shared<Shape>& begin_block(uint8_t* memory) {
  Shared<Shape>& shared =
      *reinterpret_cast<Shared<Shape>*>(memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes);
  if (threadIdx.x == 0) {
    init_barrier(shared.rows_full, 1);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(shared.full[stage], 1);                                    // the producer; TMA adds its bytes
      init_barrier(shared.empty[stage], kConsumers * kConsumerThreads / 32);  // every warp reads every column
    }
    publish_barriers();
  }
  __syncthreads();
  return shared;
}

// One thread: the rows once, then column tiles, with their vectors, as stages become empty.
template <class Shape>
__device__ __forceinline__ void produce(Shared<Shape>& shared, const CUtensorMap& u, const CUtensorMap& v,
                                        const float* vectors, const PlainGrid& work) {
  arrive_expecting(shared.rows_full, Shape::kRowBytes);
  load_tile<Shape::kFeatures, kRows>(shared.rows, u, work.row_tile * kRows, shared.rows_full);
  RingPosition<Shape::kStages> at;
  for (int tile = work.columns.begin; tile < work.columns.end; ++tile, at.advance()) {
    wait(shared.empty[at.stage], at.empty_parity());
    uint64_t& full = shared.full[at.stage];
    arrive_expecting(full, Shape::kTileBytes + Shape::kVectorBytes);
    load_tile<Shape::kFeatures, Shape::kColumns>(shared.columns[at.stage], v, tile * Shape::kColumns, full);
    if constexpr (Shape::kVectors > 0)
      load_bytes(shared.vectors[at.stage], vectors + int64_t{tile} * Shape::kVectors * Shape::kColumns,
                 Shape::kVectorBytes, full);
  }
}

// A consumer warpgroup over all column tiles of its block.
template <Operand kOperand, class Shape, class Functor>
__device__ __forceinline__ void consume(Shared<Shape>& shared, const PlainGrid& work, int consumer, Functor& functor) {
  const uint32_t u = k_major(shared_address(shared.rows) + consumer * kConsumerRows * 128);
  const uint32_t tiles = shared_address(shared.columns);
  const auto stage_offset = [](int stage) { return descriptor_offset(stage * Shape::kTileBytes); };
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) arrive(shared.empty[stage]);
  };
  constexpr int kSteps = Shape::kFeatures / kStep, kLastSteps = 128 / Shape::kColumns;  // 64 cycles of products
  float s[Shape::kLogits];
  RingPosition<Shape::kStages> at;
  int behind = 0;  // the stage that was multiplied by weights last
  int tile = work.columns.begin;
  if (gives_first_turn(consumer)) give_turn(1 - consumer);
  wait(shared.rows_full, 0);
  wait(shared.full[0], 0);
  wait_for_turn(consumer);
  while (true) {
    begin_products();
    const uint32_t v = k_major(tiles) + stage_offset(at.stage);
    multiply_features<kOperand, kRows, 0, kSteps - kLastSteps>(s, u, v);
    end_products();
    multiply_features<kOperand, kRows, kSteps - kLastSteps, kSteps>(s, u, v);
    end_products();
    wait_for_earlier_products();
    if (gives_turn(consumer, tile + 1 == work.columns.end)) give_turn(1 - consumer);
    if constexpr (Functor::kMultiplies) {
      wait_for_products(s, functor.o, functor.w);
      if (tile > work.columns.begin) release(behind);
    } else {
      wait_for_products(s);
      release(at.stage);
    }
    functor(s, tile, shared.vectors[at.stage]);
    if (++tile == work.columns.end) break;
    behind = at.stage, at.advance();
    wait(shared.full[at.stage], at.full_parity());
    wait_for_turn(consumer);
    if constexpr (Functor::kMultiplies) {
      begin_products();
      add_products<kOperand>(functor.o, functor.w, mn_major(tiles, Shape::kColumns) + stage_offset(behind));
    }
  }
  if constexpr (Functor::kMultiplies) {
    begin_products();
    add_products<kOperand>(functor.o, functor.w, mn_major(tiles, Shape::kColumns) + stage_offset(at.stage));
    end_products();
    wait_for_products(functor.o, functor.w);
  }
}

// The warpgroup of a thread, which the compiler knows to be one for a warp: descriptors stay in uniform registers.
__device__ __forceinline__ int warpgroup_of_thread() {
  return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / kConsumerThreads, 0);
}

// Whole warpgroups hand registers over: the kernel is compiled for as many a thread as all would have alike.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace hopper
}  // namespace contrastive_ext
