// Which of its 32 logits of a row a thread keeps, as bits; tiles that need no mask never ask.
#pragma once

#include <cstdint>

#include "../pairs.h"

namespace contrastive_ext {
namespace hopper {

CE_HOST_DEVICE int number_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The pair rules of a row-direction sweep on the device: images, and ids as the caller gave them.
struct DevicePairs : ImageRule {
  const int64_t* row_ids = nullptr;  // null: this side compares equal to nothing
  const int64_t* col_ids = nullptr;

  CE_HOST_DEVICE bool has_ids() const { return row_ids || col_ids; }
  CE_HOST_DEVICE bool ids_allow(int64_t row, int64_t column) const {
    if (row_ids && col_ids && row_ids[row] == col_ids[column]) return false;
    return !(col_ids && col_ids[column] == kUnfilled);
  }
};

// Bit 2 g + e: column j0 + column + 8 g + e is a negative of `row` (see Fragment), for a tile of 128 columns out of m.
CE_HOST_DEVICE uint32_t negatives_of_thread(const DevicePairs& pairs, int64_t row, int64_t j0, int column, int64_t m) {
  ImageWalk image(pairs, row, j0, 128);
  uint32_t kept = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int b = column + bit / 2 * 8 + bit % 2;
    bool keep = !image.meets(b) && j0 + b < m;
    if (keep && pairs.has_ids()) keep = pairs.ids_allow(row, j0 + b);
    kept |= static_cast<uint32_t>(keep) << bit;
  }
  return kept;
}

}  // namespace hopper
}  // namespace contrastive_ext
