// The passes over one tile, written once and compiled per instruction set (tile_kernels_*.cpp); strips.h walks it.
#pragma once

#include "strips.h"
#include "tile_histogram.h"
#include "tile_product.h"
#include "tile_softplus.h"

namespace contrastive_ext {
namespace CE_ISA {

template <class T, bool kColumns>
struct MomentsStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const Moments<T>& out) {
    using V = typename Simd<T>::V;
    const V lowest = broadcast<T>(-__builtin_inff()), zero{};
    V row_max[kRowStep], row_sum[kRowStep];
    for (int r = 0; r < kRowStep; ++r) row_max[r] = lowest, row_sum[r] = zero;
    for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
      V col_max = lowest, col_sum = zero;
      if (kColumns) col_max = load(out.col_max + j), col_sum = load(out.col_sum + j);
      for (int r = 0; r < kRowStep; ++r) {
        const V s = load(tile.s + (row + r) * tile.ld + j);
        const uint8_t* pair = classes.pair[r] + j;
        row_max[r] = larger<T>(kMasked ? keep<T>(pair, kColumnIsNegative, s, lowest) : s, row_max[r]);
        row_sum[r] += kMasked ? keep<T>(pair, kColumnIsNegative, s, zero) : s;
        if (kColumns) {
          col_max = larger<T>(kMasked ? keep<T>(pair, kRowIsNegative, s, lowest) : s, col_max);
          col_sum += kMasked ? keep<T>(pair, kRowIsNegative, s, zero) : s;
        }
      }
      if (kColumns) store(out.col_max + j, col_max), store(out.col_sum + j, col_sum);
    }
    for (int r = 0; r < kRowStep; ++r) {
      out.row_max[row + r] = horizontal_max<T>(row_max[r]);
      out.row_sum[row + r] = horizontal_sum<T>(row_sum[r]);
    }
  }
};

template <class T, bool kColumns, bool kSquare, bool kOneShift>
struct ExpSumsStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const ExpSums<T>& out) {
    using V = typename Simd<T>::V;
    const V zero{};
    const ExpFactor<T> factor{out.factor, out.factor_low};
    V row_shift[kRowStep], row_sum[kRowStep], row_square[kRowStep];
    for (int r = 0; r < kRowStep; ++r) {
      row_shift[r] = broadcast<T>(kOneShift ? T(0) : out.row_shift[row + r]);
      row_sum[r] = row_square[r] = zero;
    }
    for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
      V col_sum = zero, col_square = zero, col_shift = zero;
      if (kColumns && !kOneShift) col_shift = load(out.col_shift + j);
      for (int r = 0; r < kRowStep; ++r) {
        const int64_t at = (row + r) * tile.ld + j;
        const uint8_t* pair = classes.pair[r] + j;
        const V s = load(tile.s + at);
        const V e = kOneShift ? exp2_in_range<T>(s, factor, out.shift2) : exp_shifted<T>(s, out.beta, row_shift[r]);
        const V e_row = kMasked ? keep<T>(pair, kColumnIsNegative, e, zero) : e;
        row_sum[r] += e_row;
        if (kSquare) row_square[r] += e_row * e_row;
        if (out.e) store(out.e + at, e_row);
        if (kSquare && out.e_square) store(out.e_square + at, e_row * e_row);
        if (kColumns) {
          V e_col = kOneShift ? e : exp_shifted<T>(s, out.beta, col_shift);
          if (kMasked) e_col = keep<T>(pair, kRowIsNegative, e_col, zero);
          col_sum += e_col;
          if (kSquare) col_square += e_col * e_col;
        }
      }
      if (kColumns) store(out.col_sum + j, load(out.col_sum + j) + col_sum);
      if (kColumns && kSquare) store(out.col_square_sum + j, load(out.col_square_sum + j) + col_square);
    }
    for (int r = 0; r < kRowStep; ++r) {
      out.row_sum[row + r] = horizontal_sum<T>(row_sum[r]);
      if (kSquare) out.row_square_sum[row + r] = horizontal_sum<T>(row_square[r]);
    }
  }
};

// How the exponentials of one pair are made: kShared uses one per exponent for both directions.
template <class T, int kExponents, bool kColumns, bool kShared, bool kSquare>
struct WeightsStrip {
  using V = typename Simd<T>::V;

  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const Weights<T>& in) {
    const V zero{};
    V row_coef[kExponents][kRowStep], row_shift[kExponents][kRowStep];
    for (int k = 0; k < kExponents; ++k) {
      for (int r = 0; r < kRowStep; ++r) {
        row_coef[k][r] = broadcast<T>(in.row_coef[k][row + r]);
        row_shift[k][r] = kShared ? zero : broadcast<T>(in.row_shift[k][row + r]);
      }
    }
    for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
      V col_coef[kExponents], col_shift[kExponents];
      for (int k = 0; k < kExponents; ++k) {
        col_coef[k] = kColumns ? load(in.col_coef[k] + j) : zero;
        col_shift[k] = kColumns && !kShared ? load(in.col_shift[k] + j) : zero;
      }
      for (int r = 0; r < kRowStep; ++r) {
        T* at = tile.s + (row + r) * tile.ld + j;
        const uint8_t* pair = classes.pair[r] + j;
        const V s = load(at);
        V from_row = zero, from_col = zero, e = zero;
        for (int k = 0; k < kExponents; ++k) {
          if (kShared) {
            e = k == 1 && kSquare ? e * e : exp2_in_range<T>(s, {in.factor[k], in.factor_low[k]}, T(0));
            if (kMasked) {
              from_row += e * row_coef[k][r];
              from_col += e * col_coef[k];
            } else {
              from_row += e * (row_coef[k][r] + col_coef[k]);
            }
          } else {
            from_row += row_coef[k][r] * exp_shifted<T>(s, in.beta[k], row_shift[k][r]);
            if (kColumns) from_col += col_coef[k] * exp_shifted<T>(s, in.beta[k], col_shift[k]);
          }
        }
        if (kMasked) {
          from_row = keep<T>(pair, kColumnIsNegative, from_row, zero);
          if (kColumns) from_col = keep<T>(pair, kRowIsNegative, from_col, zero);
        }
        store(at, kColumns && (kMasked || !kShared) ? from_row + from_col : from_row);
      }
    }
  }
};

template <class T>
void moments(const Tile<T>& tile, const Moments<T>& out) {
  if (out.col_max)
    for_each_strip<MomentsStrip<T, true>>(tile, out);
  else
    for_each_strip<MomentsStrip<T, false>>(tile, out);
}

template <class T, bool kColumns>
void exp_sums_directed(const Tile<T>& tile, const ExpSums<T>& out) {
  const bool square = out.row_square_sum != nullptr, one_shift = out.row_shift == nullptr;
  if (square && one_shift)
    for_each_strip<ExpSumsStrip<T, kColumns, true, true>>(tile, out);
  else if (square)
    for_each_strip<ExpSumsStrip<T, kColumns, true, false>>(tile, out);
  else if (one_shift)
    for_each_strip<ExpSumsStrip<T, kColumns, false, true>>(tile, out);
  else
    for_each_strip<ExpSumsStrip<T, kColumns, false, false>>(tile, out);
}

template <class T>
void exp_sums(const Tile<T>& tile, const ExpSums<T>& out) {
  if (out.col_sum)
    exp_sums_directed<T, true>(tile, out);
  else
    exp_sums_directed<T, false>(tile, out);
}

template <class T>
void weights(const Tile<T>& tile, const Weights<T>& in) {
  const bool columns = in.col_coef[0] != nullptr;
  if (in.num_exponents == 1) {
    if (in.shared)
      for_each_strip<WeightsStrip<T, 1, true, true, false>>(tile, in);
    else if (columns)
      for_each_strip<WeightsStrip<T, 1, true, false, false>>(tile, in);
    else
      for_each_strip<WeightsStrip<T, 1, false, false, false>>(tile, in);
  } else {
    if (in.shared && in.square)
      for_each_strip<WeightsStrip<T, 2, true, true, true>>(tile, in);
    else if (in.shared)
      for_each_strip<WeightsStrip<T, 2, true, true, false>>(tile, in);
    else if (columns)
      for_each_strip<WeightsStrip<T, 2, true, false, false>>(tile, in);
    else
      for_each_strip<WeightsStrip<T, 2, false, false, false>>(tile, in);
  }
}

template <class T>
void larger_of(T* x, const T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<T>::kWidth) {
    const typename Simd<T>::V a = load(x + i), b = load(y + i);
    store(x + i, (a > b) | (a != a) ? a : b);  // a NaN in b fails both
  }
}

template <class T, bool kLimits>
uint64_t above_one_or_both(const T* x, int64_t begin, int64_t end, T limit, const T* limits, int64_t* block) {
  using V = typename Simd<T>::V;
  constexpr int64_t kVectors = kLaneBlock / Simd<T>::kWidth;
  static_assert(kColumnPad % kLaneBlock == 0, "whole blocks are readable");
  const V bound = broadcast<T>(limit);
  for (int64_t j = begin / kLaneBlock * kLaneBlock; j < end; j += kLaneBlock) {
    typename Simd<T>::I above[kVectors], either{};
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * Simd<T>::kWidth;
      above[v] = load(x + at) > (kLimits ? smaller<T>(load(limits + at), bound) : bound);
      either |= above[v];
    }
    if (!any(either)) continue;
    uint64_t found = lane_bits<T, kVectors>(above);
    if (begin > j) found &= ~uint64_t{0} << (begin - j);
    if (end < j + kLaneBlock) found &= ~(~uint64_t{0} << (end - j));
    if (!found) continue;
    *block = j;
    return found;
  }
  return 0;
}

template <class T>
uint64_t above(const T* x, int64_t begin, int64_t end, T limit, const T* limits, int64_t* block) {
  const auto search = limits ? above_one_or_both<T, true> : above_one_or_both<T, false>;
  return search(x, begin, end, limit, limits, block);
}

template <class T>
void tile_classes(const Tile<T>& tile, uint8_t* pair_class) {
  StripClasses classes;
  for (int64_t row = 0; row < tile.rows; row += kRowStep) {
    if (!needs_classes(tile, row, classes)) memset(classes.pair, kBothNegative, sizeof(classes.pair));
    for (int64_t r = 0; r < kRowStep && row + r < tile.rows; ++r)
      memcpy(pair_class + (row + r) * tile.cols, classes.pair[r], static_cast<size_t>(tile.cols));
  }
}

template <class T>
void exp2_array(const T* x, T* y, int64_t n, T factor, T factor_low, T shift2) {
  for (int64_t i = 0; i < n; i += Simd<T>::kWidth) {
    const int64_t left = n - i < Simd<T>::kWidth ? n - i : Simd<T>::kWidth;
    T lanes[Simd<T>::kWidth] = {};
    memcpy(lanes, x + i, static_cast<size_t>(left) * sizeof(T));
    const typename Simd<T>::V v = load(lanes);
    store(lanes, factor == T(0) ? exp<T>(v) : exp2_in_range<T>(v, {factor, factor_low}, shift2));
    memcpy(y + i, lanes, static_cast<size_t>(left) * sizeof(T));
  }
}

template <class T>
void exp_array(const T* x, T* y, int64_t n) {
  exp2_array<T>(x, y, n, T(0), T(0), T(0));
}

template <class T>
constexpr TileKernels<T> all_kernels() {
  return {product<T>,       transpose<T>,       moments<T>,      exp_sums<T>,  weights<T>,     larger_of<T>,
          above<T>,         extremes<T>,        bin_counts<T>,   rank_keys<T>, ranked_sums<T>, ranked_weights<T>,
          softplus_sums<T>, sigmoid_weights<T>, tile_classes<T>, exp_array<T>, exp2_array<T>};
}

extern const TileKernels<float> kKernelsF32;
extern const TileKernels<double> kKernelsF64;
const TileKernels<float> kKernelsF32 = all_kernels<float>();
const TileKernels<double> kKernelsF64 = all_kernels<double>();

}  // namespace CE_ISA
}  // namespace contrastive_ext
