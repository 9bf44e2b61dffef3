// What both directions of a sweep are told of a problem.
#pragma once

#include <cstdint>

#include "tile_mask.h"

namespace contrastive_ext {
namespace hopper {

struct SweepArguments {
  DevicePairs pairs;  // pointers on the device
  int64_t n, m;       // rows and columns, below 2^31
  float beta;
  float scale;                // unless scale_tensor
  const float* scale_tensor;  // on the device, or null
  bool unit;                  // |<u_i, v_j>| <= 1 up to rounding

#if defined(__CUDACC__)
  // On the device: 1/temperature.
  __device__ __forceinline__ float known_scale() const { return scale_tensor ? *scale_tensor : scale; }
#endif
};

}  // namespace hopper
}  // namespace contrastive_ext
