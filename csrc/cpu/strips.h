// How the passes walk a tile: in strips of kRowStep rows. Four independent exponentials hide each other's latency and a
// per-column accumulator is read and written once per four rows. A strip without ignored pairs and without ragged edges
// takes the plain loop; the others get one class byte per pair. Padding rows and columns have class 0. Looking for
// ignored pairs costs a few percent of the strip's product, so it is done again in every pass and nothing is kept.
#pragma once

#include "exp2.h"
#include "tile.h"

namespace contrastive_ext {
namespace CE_ISA {

struct StripClasses {
  uint8_t pair[kRowStep][kMaxTileCols];
};

inline int64_t padded_columns(int64_t cols, int64_t width) { return (cols + width - 1) / width * width; }

// Every rule works on one row of a tile, clears bits of its classes and returns whether a pair lost one.

inline bool apply_ids(const PairRules& rules, int64_t i, int64_t j0, int64_t cols, uint8_t* pair) {
  using I = Simd<float>::I;
  const int32_t row_bits = rules.row_ids[i] == kUnfilledId ? kColumnIsNegative : kBothNegative;
  const I row = I{} + rules.row_ids[i], both = I{} + row_bits, padding = both & kRowIsNegative, none{};
  I lost{};
  for (int64_t j = 0; j < cols; j += Simd<float>::kWidth) {
    I col;
    memcpy(&col, rules.col_ids + j0 + j, sizeof(col));
    I bits = col == kUnfilledId ? padding : both;
    bits = (rules.only_equal_ids ? col != row : col == row) ? none : bits;
    const Simd<float>::Bytes bytes = narrow<float>(bits);
    memcpy(pair + j, &bytes, sizeof(bytes));
    lost |= bits ^ kBothNegative;
  }
  return any(lost);
}

template <class T>
inline bool apply_gate(const Tile<T>& tile, int64_t row, uint8_t* pair) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  const T* gate = tile.gate + row * tile.ld;
  const V row_limit = broadcast<T>(tile.row_limit[row]);
  const I column_lost = I{} + kColumnIsNegative, row_lost = I{} + kRowIsNegative, none{};
  I lost{};
  for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
    const V score = load(gate + j);
    I bits = score > row_limit ? column_lost : none;  // false for NaN: the pair stays
    if (tile.col_limit) bits |= score > load(tile.col_limit + j) ? row_lost : none;
    Bytes bytes;
    memcpy(&bytes, pair + j, sizeof(bytes));
    bytes &= ~narrow<T>(bits);
    memcpy(pair + j, &bytes, sizeof(bytes));
    lost |= bits;
  }
  return any(lost);
}

inline bool apply_images(const PairRules& rules, int64_t i, int64_t j0, int64_t cols, uint8_t* pair) {
  const int64_t begin = j0 > rules.positive_offset ? j0 : rules.positive_offset;
  const int64_t shown_end = rules.positive_offset + rules.num_rows;
  const int64_t end = j0 + cols < shown_end ? j0 + cols : shown_end;
  int64_t to_match = (i - (begin - rules.positive_offset)) % rules.num_images;
  if (to_match < 0) to_match += rules.num_images;
  for (int64_t j = begin + to_match; j < end; j += rules.num_images) pair[j - j0] = 0;
  return begin + to_match < end;
}

// Clears `bit` of pair[x] for every x in [0, count) with first + x in the list.
inline bool apply_list(const SortedLists& lists, int64_t list, int64_t first, int64_t count, uint8_t bit,
                       uint8_t* pair) {
  int64_t low = lists.begin[list], end = lists.begin[list + 1];
  for (int64_t high = end; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (lists.item[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t begin = low;
  for (; low < end && lists.item[low] < first + count; ++low)
    pair[lists.item[low] - first] &= static_cast<uint8_t>(~bit);
  return low > begin;
}

inline bool apply_lists(const PairRules& rules, int64_t i, int64_t j0, int64_t cols, uint8_t* pair) {
  const int64_t lists = rules.num_lists;
  bool lost = apply_list(rules.ignored, i % lists, j0, cols, kColumnIsNegative, pair);
  if (!rules.ignoring.begin) return lost;
  for (int64_t first = j0 / lists * lists; first < j0 + cols; first += lists)  // column j shows list j - first
    lost |= apply_list(rules.ignoring, i, j0 - first, cols, kRowIsNegative, pair);
  return lost;
}

// Returns whether a pair is ignored; if not, the strip may as well take the plain loop.
template <class T>
inline bool classify_row(const Tile<T>& tile, int64_t row, uint8_t* pair) {
  const PairRules& rules = *tile.pairs;
  const int64_t i = tile.i0 + row;
  bool lost = false;
  if (rules.row_ids)
    lost = apply_ids(rules, i, tile.j0, tile.cols, pair);
  else
    memset(pair, kBothNegative, static_cast<size_t>(tile.cols));
  if (tile.gate) lost |= apply_gate(tile, row, pair);
  if (rules.num_images > 0) lost |= apply_images(rules, i, tile.j0, tile.cols, pair);
  if (rules.num_lists > 0) lost |= apply_lists(rules, i, tile.j0, tile.cols, pair);
  return lost;
}

template <class T>
inline bool classify_strip(const Tile<T>& tile, int64_t row, StripClasses& classes) {
  const int64_t padding = padded_columns(tile.cols, kColumnPad) - tile.cols;
  bool lost = false;
  for (int64_t r = 0; r < kRowStep; ++r) {
    uint8_t* pair = classes.pair[r];
    if (row + r >= tile.rows) {
      memset(pair, 0, static_cast<size_t>(tile.cols + padding));
      continue;
    }
    if (tile.special)
      lost |= classify_row(tile, row + r, pair);
    else
      memset(pair, kBothNegative, static_cast<size_t>(tile.cols));
    memset(pair + tile.cols, 0, static_cast<size_t>(padding));
    if (!tile.upper) continue;
    const int64_t below = tile.i0 + row + r - tile.j0;  // this many columns lie below the diagonal
    if (below > 0) memset(pair, 0, static_cast<size_t>(below < tile.cols ? below : tile.cols));
    if (below >= 0 && below < tile.cols) pair[below] &= kColumnIsNegative;
  }
  return lost;
}

// Whether the strip needs `classes`, which are filled in if so.
template <class T>
inline bool needs_classes(const Tile<T>& tile, int64_t row, StripClasses& classes) {
  const bool edge = tile.upper || tile.cols % Simd<T>::kWidth != 0 || row + kRowStep > tile.rows;
  if (!edge && !tile.special) return false;
  return classify_strip(tile, row, classes) || edge;
}

template <class T>
inline void count_strip(const Tile<T>& tile, int64_t row, const StripClasses& classes) {
  typedef uint8_t B __attribute__((vector_size(CE_VECTOR_BYTES)));
  static_assert(kMaxTileCols / CE_VECTOR_BYTES < 256 && kColumnPad % CE_VECTOR_BYTES == 0, "a byte counts a lane");
  B row_count[kRowStep] = {};
  uint8_t col_count[kMaxTileCols];
  for (int64_t j = 0; j < tile.cols; j += CE_VECTOR_BYTES) {
    B col{};
    for (int r = 0; r < kRowStep; ++r) {
      B pair;
      memcpy(&pair, classes.pair[r] + j, sizeof(pair));
      row_count[r] += pair & kColumnIsNegative;
      col += pair >> 1;  // kRowIsNegative as a number
    }
    memcpy(col_count + j, &col, sizeof(col));
  }
  for (int r = 0; r < kRowStep; ++r) {
    int count = 0;
    for (int lane = 0; lane < CE_VECTOR_BYTES; ++lane) count += row_count[r][lane];
    tile.row_count[row + r] = static_cast<T>(count);
  }
  for (int64_t j = 0; tile.col_count && j < tile.cols; ++j) tile.col_count[j] += col_count[j];
}

// Calls Strip::template run<masked>(tile, row, classes, args) for every strip, and counts negatives where asked to.
template <class Strip, class T, class Args>
inline void for_each_strip(const Tile<T>& tile, const Args& args) {
  StripClasses classes;
  T plain_rows = 0;
  for (int64_t row = 0; row < tile.rows; row += kRowStep) {
    if (needs_classes(tile, row, classes)) {
      Strip::template run<true>(tile, row, classes, args);
      if (tile.row_count) count_strip(tile, row, classes);
    } else {
      Strip::template run<false>(tile, row, classes, args);
      plain_rows += kRowStep;
      for (int64_t r = 0; tile.row_count && r < kRowStep; ++r) tile.row_count[row + r] = static_cast<T>(tile.cols);
    }
  }
  for (int64_t j = 0; tile.col_count && j < tile.cols; ++j) tile.col_count[j] += plain_rows;
}

// exp(beta s - shift). beta s is rounded before the shift comes off, as the shift itself was: where one negative
// dominates its row, shift = beta s, the difference is 0 and its weight exactly 1.
template <class T>
inline typename Simd<T>::V exp_shifted(typename Simd<T>::V s, T beta, typename Simd<T>::V shift) {
  return exp<T>(rounded(s * beta) - shift);
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
