// What a thread makes of its logits: two rows, 32 columns of each in a tile of 64 x 128 (see Fragment). Plain
// arithmetic, so that a host can play whole blocks (tests/csrc/cuda).
#pragma once

#include <cstdint>

#include "partials.h"
#include "tile_mask.h"

namespace contrastive_ext {
namespace hopper {

constexpr int kFragment = 64;  // logits of a thread and tile
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

struct ThreadRows {
  int64_t index[2];
  RowPartial partial[2];

  // Rows `first` and first + 8. Rows beyond the last one repeat it; nobody stores them.
  CE_HOST_DEVICE ThreadRows(int64_t first, int64_t n, bool online) {
    for (int h = 0; h < 2; ++h) {
      index[h] = first + 8 * h < n ? first + 8 * h : n - 1;
      if (!online) partial[h].lse.shift = 0;
    }
  }

  // Every logit of the tile belongs to a negative.
  CE_HOST_DEVICE void count_all() {
    for (int h = 0; h < 2; ++h) partial[h].count += kFragment / 2;
  }

  // Sets the logits of pairs that are ignored to -inf and counts the others. `column` is the thread's first.
  CE_HOST_DEVICE void mask(float (&s)[kFragment], int column, int64_t j0, const DevicePairs& pairs, int64_t m) {
    CE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t kept = negatives_of_thread(pairs, index[h], j0, column, m);
      CE_UNROLL
      for (int bit = 0; bit < 32; ++bit) {
        if (!(kept >> bit & 1)) s[bit / 2 * 4 + 2 * h + bit % 2] = -INFINITY;
      }
      partial[h].count += static_cast<float>(number_of_bits(kept));
    }
  }

  // Adds the exponentials of a tile. Four sums in flight hide the latency of addition and keep its error small.
  template <bool kOnline>
  CE_HOST_DEVICE void add(const float (&s)[kFragment], float factor) {
    CE_UNROLL
    for (int h = 0; h < 2; ++h) {
      OnlineLse<float>& lse = partial[h].lse;
      float shift = 0;
      if (kOnline) {
        float largest = -INFINITY;
        CE_UNROLL
        for (int k = 2 * h; k < kFragment; k += 4) largest = fmaxf(largest, fmaxf(s[k], s[k + 1]));
        lse.raise(rounded_product(largest, factor));
        if (lse.shift != -INFINITY) shift = lse.shift;
      }
      float sums[4] = {};
      CE_UNROLL
      for (int k = 0; k < kFragment / 2; ++k) {
        const float logit = s[k / 2 * 4 + 2 * h + k % 2];
        // online: the product is rounded as the shift was, so the largest term is exactly 1 (docs/measurements.md)
        const float x = kOnline ? (rounded_product(logit, factor) - shift) * kLog2E : logit * (factor * kLog2E);
        sums[k % 4] += exp2_fast(x);
      }
      lse.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
};

}  // namespace hopper
}  // namespace contrastive_ext
