// The pair rules: which column is a negative of which row, asked in both directions (contrastive_ext/problem/pairs.py).
//
// Row i shows image i % num_images; column j with 0 <= j - positive_offset < num_rows shows image
// (j - positive_offset) % num_images. A pair of one image (self, positives) is never a negative. Integer ids
// cancel further pairs: equal (or different) ids in both directions, an unfilled candidate in the direction that would
// use it; lists cancel in the direction of the anchor they belong to.
// The logits may be symmetric, the classification is not: a padded row is nobody's negative but still an anchor.
//
// Plain data: pair_tables.h builds what it points to, tile_kernels.h applies it strip by strip.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace contrastive_ext {

constexpr int64_t kUnfilled = INT64_MIN;  // the caller's id of padding

// A pair's class is a bit set, so that one byte serves both directions.
constexpr uint8_t kColumnIsNegative = 1;  // keep(i -> j): column j counts for anchor i
constexpr uint8_t kRowIsNegative = 2;     // keep(j -> i): row i counts for anchor j
constexpr uint8_t kBothNegative = kColumnIsNegative | kRowIsNegative;

// Ids are compared as 32-bit numbers of the distinct ones; these stand for padding and for a side without ids.
constexpr int32_t kUnfilledId = 0, kNoRowId = -1, kNoColumnId = -2;

// Lists of numbers behind one another: list k is item[begin[k]] to item[begin[k + 1]], ascending, without repeats.
struct SortedLists {
  const int64_t* begin = nullptr;
  const int64_t* item = nullptr;
};

// Row i and column j show one image.
struct ImageRule {
  int64_t num_rows = 0;
  int64_t num_images = 0;       // 0: no pair shows the same image (a queue)
  int64_t positive_offset = 0;  // first column that shows an image

  CE_HOST_DEVICE bool same_image(int64_t i, int64_t j) const {
    const int64_t shown = j - positive_offset;
    return num_images > 0 && shown >= 0 && shown < num_rows && (shown - i) % num_images == 0;
  }

  // Whether rows [i0, i1) x columns [j0, j1) can hold a pair of one image: the difference j - i takes every value of an
  // interval, so the question is whether a multiple of num_images lies in it.
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

struct PairRules : ImageRule {
  bool only_equal_ids = false;
  const int32_t* row_ids = nullptr;  // null: no ids on either side; readable kColumnPad beyond the last column
  const int32_t* col_ids = nullptr;
  int64_t num_lists = 0;  // 0: none
  SortedLists ignored;    // row i ignores the columns in list i % num_lists
  SortedLists ignoring;   // one set: the lists that hold row i, which the columns with j % num_lists in it ignore

  // Whether any pair but those of one image may have to be ignored.
  CE_HOST_DEVICE bool has_tables() const { return row_ids || num_lists > 0; }
};

// One row's pass over the columns of a tile, left to right: which of them show the row's image. They come every
// num_images columns, so a pair costs a comparison and not a remainder.
class ImageWalk {
 public:
  // Columns [j0, j0 + width).
  CE_HOST_DEVICE ImageWalk(const ImageRule& rules, int64_t row, int64_t j0, int width)
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
