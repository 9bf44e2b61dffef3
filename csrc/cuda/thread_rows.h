// What a thread of the forward makes of its logits: sums of two rows, a quarter of their columns in every tile (see
// Fragment). Plain arithmetic, so that a host can play whole blocks (tests/csrc/cuda).
#pragma once

#include <cstdint>

#include "exponentials.h"
#include "partials.h"
#include "tile_mask.h"

namespace contrastive_ext {
namespace hopper {

template <int kLogits>
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
    for (int h = 0; h < 2; ++h) partial[h].count += kLogits / 2;
  }

  // Sets the logits of pairs that are ignored to -inf (exponentials: 0) and counts the others. `column` is the thread's
  // first.
  CE_HOST_DEVICE void mask(float (&s)[kLogits], int column, int64_t j0, const DevicePairs& pairs, int64_t m,
                           float ignored = -INFINITY) {
    CE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t kept = negatives_of_thread<kLogits / 2>(pairs, index[h], j0, column, m);
      CE_UNROLL
      for (int bit = 0; bit < kLogits / 2; ++bit) {
        if (!(kept >> bit & 1)) s[bit / 2 * 4 + 2 * h + bit % 2] = ignored;
      }
      partial[h].count += static_cast<float>(number_of_bits(kept));
    }
  }

  // Adds the exponentials of a tile.
  template <bool kOnline>
  CE_HOST_DEVICE void add(const float (&s)[kLogits], float factor) {
    CE_UNROLL
    for (int h = 0; h < 2; ++h) {
      OnlineLse<float>& lse = partial[h].lse;
      float shift = 0;
      if (kOnline) {
        float largest = -INFINITY;
        CE_UNROLL
        for (int k = 2 * h; k < kLogits; k += 4) largest = fmaxf(largest, fmaxf(s[k], s[k + 1]));
        lse.raise(rounded_product(largest, factor));
        if (lse.shift != -INFINITY) shift = lse.shift;
      }
      lse.sum += sum_of_row(s, h, [&](float logit) {
        // online: the product is rounded as the shift was, so the largest term is exactly 1 (docs/measurements.md)
        const float x = kOnline ? (rounded_product(logit, factor) - shift) * kLog2E : logit * (factor * kLog2E);
        return exp2_fast(x);
      });
    }
  }

  // In place, the exponentials of a tile without a shift, and their addition.
  static CE_HOST_DEVICE void exponentiate(float (&s)[kLogits], float factor) {
    CE_UNROLL
    for (int k = 0; k < kLogits; ++k) s[k] = exp2_fast(s[k] * (factor * kLog2E));
  }
  CE_HOST_DEVICE void add_terms(const float (&terms)[kLogits]) {
    CE_UNROLL
    for (int h = 0; h < 2; ++h) partial[h].lse.sum += sum_of_row(terms, h, [](float term) { return term; });
  }

 private:
  // Four sums in flight hide the latency of addition and keep its error small.
  template <class Function>
  static CE_HOST_DEVICE float sum_of_row(const float (&s)[kLogits], int h, const Function& function) {
    float sums[4] = {};
    CE_UNROLL
    for (int k = 0; k < kLogits / 2; ++k) sums[k % 4] += function(s[k / 2 * 4 + 2 * h + k % 2]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

}  // namespace hopper
}  // namespace contrastive_ext
