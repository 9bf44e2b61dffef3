// Tiles from global to shared memory by the tensor memory accelerator.
#pragma once

#include <cuda.h>  // types only: nothing of libcuda is linked

#include <cstdint>

#include "mbarrier.cuh"
#include "shared_layout.h"

namespace contrastive_ext {
namespace hopper {

// Rows [row, row + kRows) of a matrix [*, kFeatures], all boxes of every row, into `tile`; `barrier` counts the bytes.
// Rows outside the matrix arrive as zeros and count as well. One thread asks for all of it.
template <int kFeatures, int kRows>
__device__ __forceinline__ void load_tile(uint8_t* tile, const CUtensorMap& matrix, int row, uint64_t& barrier) {
#pragma unroll
  for (int feature = 0; feature < kFeatures; feature += kBoxFeatures)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(tile) + feature / kBoxFeatures * kRows * 128),
        "l"(reinterpret_cast<uint64_t>(&matrix)), "r"(feature), "r"(row), "r"(shared_address(&barrier))
        : "memory");
}

// `bytes` from global to shared memory, both 16-byte aligned; `barrier` counts them.
__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, uint64_t& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

}  // namespace hopper
}  // namespace contrastive_ext
