// The pair functor: which column is a negative of which row, asked in both directions.
//
// Row i shows image i % num_images; column j with 0 <= j - positive_offset < num_rows shows image
// (j - positive_offset) % num_images. A pair of one image (self, positives) is never a negative. Integer ids
// cancel further pairs: equal ids in both directions, an UNFILLED candidate in the direction that would use it.
// The logits may be symmetric, the classification is not: a padded row is nobody's negative but still an anchor.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace contrastive_ext {

constexpr int64_t kUnfilled = INT64_MIN;

// A pair's class is a bit set, so that one byte serves both directions.
constexpr uint8_t kColumnIsNegative = 1;  // keep(i -> j): column j counts for anchor i
constexpr uint8_t kRowIsNegative = 2;     // keep(j -> i): row i counts for anchor j
constexpr uint8_t kBothNegative = kColumnIsNegative | kRowIsNegative;

struct PairRules {
  int64_t num_rows = 0;
  int64_t num_images = 0;            // 0: no pair shows the same image (a queue)
  int64_t positive_offset = 0;       // first column that shows an image
  const int64_t* row_ids = nullptr;  // null: this side compares equal to nothing
  const int64_t* col_ids = nullptr;

  CE_HOST_DEVICE bool has_ids() const { return row_ids != nullptr || col_ids != nullptr; }

  CE_HOST_DEVICE bool same_image(int64_t i, int64_t j) const {
    const int64_t shown = j - positive_offset;
    return num_images > 0 && shown >= 0 && shown < num_rows && (shown - i) % num_images == 0;
  }

  CE_HOST_DEVICE uint8_t id_class(int64_t i, int64_t j) const {
    if (row_ids && col_ids && row_ids[i] == col_ids[j]) return 0;
    uint8_t pair = kBothNegative;
    if (col_ids && col_ids[j] == kUnfilled) pair &= static_cast<uint8_t>(~kColumnIsNegative);
    if (row_ids && row_ids[i] == kUnfilled) pair &= static_cast<uint8_t>(~kRowIsNegative);
    return pair;
  }

  CE_HOST_DEVICE uint8_t classify(int64_t i, int64_t j) const { return same_image(i, j) ? uint8_t{0} : id_class(i, j); }

  // Whether rows [i0, i1) x columns [j0, j1) can hold a pair of one image: the difference j - i takes every value of an
  // interval, so the question is whether a multiple of num_images lies in it. Ids are not looked at.
  CE_HOST_DEVICE bool may_share_image(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (num_images <= 0) return false;
    int64_t first = j0 - positive_offset, last = j1 - 1 - positive_offset;
    if (first < 0) first = 0;
    if (last > num_rows - 1) last = num_rows - 1;
    if (first > last || i0 >= i1) return false;
    const int64_t low = first - (i1 - 1), high = last - i0;
    const int64_t multiple = (high >= 0 ? high / num_images : -((-high + num_images - 1) / num_images)) * num_images;
    return multiple >= low;
  }
};

// One row's pass over the columns of a tile, left to right: which of them show the row's image. They come every
// num_images columns, so a pair costs a comparison and not a remainder.
class ImageWalk {
 public:
  // Columns [j0, j0 + width).
  CE_HOST_DEVICE ImageWalk(const PairRules& rules, int64_t row, int64_t j0, int width)
      : next_(width), end_(0), step_(width) {
    const int64_t n = rules.num_images;
    const int64_t begin = rules.positive_offset > j0 ? rules.positive_offset - j0 : 0;
    int64_t end = rules.positive_offset + rules.num_rows - j0;
    if (end > width) end = width;
    if (n <= 0 || begin >= end) return;
    int64_t distance = (row - (j0 + begin - rules.positive_offset)) % n;
    if (distance < 0) distance += n;
    if (begin + distance >= end) return;
    next_ = static_cast<int>(begin + distance), end_ = static_cast<int>(end);
    if (n < width) step_ = static_cast<int>(n);
  }

  // Whether column j0 + column shows the row's image; columns must ascend from call to call.
  CE_HOST_DEVICE bool meets(int column) {
    while (next_ < column) next_ += step_;
    return next_ == column && column < end_;
  }

 private:
  int next_, end_, step_;
};

}  // namespace contrastive_ext
