// What every split leaves for a row, and the sum of it in a fixed order: [splits, 3, rows] of shift, sum, count.
#pragma once

#include <cstdint>

#include "../online_lse.h"

namespace contrastive_ext {
namespace hopper {

constexpr int kParts = 3;

struct RowPartial {
  OnlineLse<float> lse;
  float count = 0;

  CE_HOST_DEVICE void merge(const RowPartial& other) {
    lse.merge(other.lse);
    count += other.count;
  }
  CE_HOST_DEVICE void store(float* partials, int64_t rows, int64_t split, int64_t row) const {
    float* out = partials + split * kParts * rows + row;
    out[0] = lse.shift, out[rows] = lse.sum, out[2 * rows] = count;
  }
  static CE_HOST_DEVICE RowPartial load(const float* partials, int64_t rows, int64_t split, int64_t row) {
    const float* in = partials + split * kParts * rows + row;
    RowPartial partial;
    partial.lse.shift = in[0], partial.lse.sum = in[rows], partial.count = in[2 * rows];
    return partial;
  }
};

// All splits of a row, the first one first: the same bits whichever block finished first.
CE_HOST_DEVICE RowPartial merge_splits(const float* partials, int64_t rows, int64_t splits, int64_t row) {
  RowPartial total;
  for (int64_t split = 0; split < splits; ++split) total.merge(RowPartial::load(partials, rows, split, row));
  return total;
}

}  // namespace hopper
}  // namespace contrastive_ext
