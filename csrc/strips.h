// How the passes walk a tile: in strips of kRowStep rows. Four independent exponentials hide each other's latency and a
// per-column accumulator is read and written once per four rows. A strip without ignored pairs and without ragged edges
// takes the plain loop; the others get one class byte per pair. Padding rows and columns have class 0.
#pragma once

#include "exp2.h"
#include "tile.h"

namespace contrastive_ext {
namespace CE_ISA {

struct StripClasses {
  uint8_t pair[kRowStep][kMaxTileCols];
};

inline int64_t padded_columns(int64_t cols, int64_t width) { return (cols + width - 1) / width * width; }

inline void classify_row(const PairRules& rules, int64_t i, int64_t j0, int64_t cols, uint8_t* pair) {
  if (rules.has_ids()) {
    for (int64_t j = 0; j < cols; ++j) pair[j] = rules.id_class(i, j0 + j);
  } else {
    memset(pair, kBothNegative, static_cast<size_t>(cols));
  }
  if (rules.num_images <= 0) return;
  const int64_t begin = j0 > rules.positive_offset ? j0 : rules.positive_offset;
  const int64_t shown_end = rules.positive_offset + rules.num_rows;
  const int64_t end = j0 + cols < shown_end ? j0 + cols : shown_end;
  int64_t to_match = (i - (begin - rules.positive_offset)) % rules.num_images;
  if (to_match < 0) to_match += rules.num_images;
  for (int64_t j = begin + to_match; j < end; j += rules.num_images) pair[j - j0] = 0;
}

template <class T>
inline void classify_strip(const Tile<T>& tile, int64_t row, StripClasses& classes) {
  const int64_t padded = padded_columns(tile.cols, Simd<T>::kWidth);
  for (int64_t r = 0; r < kRowStep; ++r) {
    uint8_t* pair = classes.pair[r];
    memset(pair, 0, static_cast<size_t>(padded));
    if (row + r >= tile.rows) continue;
    const int64_t i = tile.i0 + row + r;
    if (tile.special)
      classify_row(*tile.pairs, i, tile.j0, tile.cols, pair);
    else
      memset(pair, kBothNegative, static_cast<size_t>(tile.cols));
    if (!tile.upper) continue;
    const int64_t below = i - tile.j0;  // this many columns lie below the diagonal
    if (below > 0) memset(pair, 0, static_cast<size_t>(below < tile.cols ? below : tile.cols));
    if (below >= 0 && below < tile.cols) pair[below] &= kColumnIsNegative;
  }
}

// Calls Strip<T>::template run<masked>(tile, row, classes, args) for every strip.
template <class Strip, class T, class Args>
inline void for_each_strip(const Tile<T>& tile, const Args& args) {
  StripClasses classes;
  const bool ragged = tile.cols % Simd<T>::kWidth != 0;
  for (int64_t row = 0; row < tile.rows; row += kRowStep) {
    if (tile.special || tile.upper || ragged || row + kRowStep > tile.rows) {
      classify_strip(tile, row, classes);
      Strip::template run<true>(tile, row, classes, args);
    } else {
      Strip::template run<false>(tile, row, classes, args);
    }
  }
}

// exp(beta s - shift). beta s is rounded before the shift comes off, as the shift itself was: where one negative
// dominates its row, shift = beta s, the difference is 0 and its weight exactly 1.
template <class T>
inline typename Simd<T>::V exp_shifted(typename Simd<T>::V s, T beta, typename Simd<T>::V shift) {
  return exp<T>(rounded(s * beta) - shift);
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
