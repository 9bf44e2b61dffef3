// Which tiles of a block need a mask, and which of its logits of a row a thread keeps there, as bits.
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

// The pair rules of a sweep on the device: images, and ids as the caller gave them. Either side may be the one that
// shows images from some row on: a gradient by the columns sweeps with the roles swapped.
struct DevicePairs : ImageRule {
  int64_t first_row = 0;             // row first_row shows image 0; then positive_offset is 0
  const int64_t* row_ids = nullptr;  // null: this side compares equal to nothing
  const int64_t* col_ids = nullptr;

  CE_HOST_DEVICE bool has_ids() const { return row_ids || col_ids; }

  // Whether ids let `column` be a negative of `row`, or, in reverse, `row` one of `column`.
  CE_HOST_DEVICE bool ids_allow(int64_t row, int64_t column, bool reverse) const {
    if (row_ids && col_ids && row_ids[row] == col_ids[column]) return false;
    return reverse ? !(row_ids && row_ids[row] == kUnfilled) : !(col_ids && col_ids[column] == kUnfilled);
  }

  // The first column from j0 on that shows an image of one of the rows [i0, i1); INT64_MAX: none.
  CE_HOST_DEVICE int64_t first_shared_column(int64_t i0, int64_t i1, int64_t j0) const {
    int64_t a = i0 - first_row, b = i1 - first_row;
    if (a < 0) a = 0;
    if (b > num_rows) b = num_rows;
    int64_t shown = j0 - positive_offset;
    if (shown < 0) shown = 0;
    if (num_images <= 0 || a >= b) return INT64_MAX;
    const int64_t distance = ((shown - a) % num_images + num_images) % num_images;
    if (distance >= b - a) shown += num_images - distance;
    return shown < num_rows ? shown + positive_offset : INT64_MAX;
  }
};

// Goes over the column tiles of a block in order and knows the next one that needs a mask: a comparison per tile, and
// divisions only where there is one.
class MaskedTiles {
 public:
  // Rows [i0, i1) and tiles of `width` columns from `tile` on. Those that reach beyond column m need a mask.
  CE_HOST_DEVICE MaskedTiles(const DevicePairs& pairs, int i0, int i1, int m, int width, int tile)
      : i0_(i0), i1_(i1), m_(m), width_(width) {
    find(pairs, tile);
  }

  // Whether `tile` needs a mask; tiles must ascend from call to call.
  CE_HOST_DEVICE bool meets(const DevicePairs& pairs, int tile) {
    if (tile < next_) return false;
    find(pairs, tile + 1);
    return true;
  }

 private:
  CE_HOST_DEVICE void find(const DevicePairs& pairs, int tile) {
    next_ = m_ / width_;  // the tail, or behind the last tile
    if (pairs.has_ids()) next_ = tile;
    const int64_t column = pairs.first_shared_column(i0_, i1_, int64_t{tile} * width_);
    if (column < int64_t{next_} * width_) next_ = static_cast<int>(column / width_);
  }

  int i0_, i1_, m_, width_, next_;
};

// Which of its logits a thread keeps, `bit` of row `h` as below: all, or those of a mask.
struct AllKept {
  CE_HOST_DEVICE bool operator()(int, int) const { return true; }
};
struct KeptBits {
  uint32_t of_row[2];
  CE_HOST_DEVICE bool operator()(int h, int bit) const { return of_row[h] >> bit & 1; }
};

// Bit 2 g + e: column j0 + column + 8 g + e is a negative of `row` (see Fragment), or in reverse the row one of it, for
// a tile of 4 kBits columns out of m.
template <int kBits>
CE_HOST_DEVICE uint32_t negatives_of_thread(const DevicePairs& pairs, int64_t row, int64_t j0, int column, int64_t m,
                                            bool reverse = false) {
  ImageRule images = pairs;
  const int64_t shown = row - pairs.first_row;
  if (shown < 0 || shown >= pairs.num_rows) images.num_images = 0;
  ImageWalk image(images, shown, j0, 4 * kBits);
  uint32_t kept = 0;
  for (int bit = 0; bit < kBits; ++bit) {
    const int b = column + bit / 2 * 8 + bit % 2;
    bool keep = !image.meets(b) && j0 + b < m;
    if (keep && pairs.has_ids()) keep = pairs.ids_allow(row, j0 + b, reverse);
    kept |= static_cast<uint32_t>(keep) << bit;
  }
  return kept;
}

}  // namespace hopper
}  // namespace contrastive_ext
