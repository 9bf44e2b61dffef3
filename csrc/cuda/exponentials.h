// Powers of two as the kernels compute them.
#pragma once

#include <cmath>

#include "../host_device.h"

namespace contrastive_ext {
namespace hopper {

constexpr float kLog2E = 1.44269504f;

CE_HOST_DEVICE float exp2_fast(float x) {  // relative error 2^-22; 0 for -inf, NaN for NaN
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

CE_HOST_DEVICE float rounded_product(float a, float b) {  // never part of a fused multiply-add
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace hopper
}  // namespace contrastive_ext
