// What the two directions of the row statistics share: the request, the instruction-set-independent tile sizes, the
// choice between static shift and online maximum.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "compat.h"
#include "pairs.h"
#include "scores.h"
#include "sweep.h"
#include "tile.h"

namespace contrastive_ext {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// beta * log2(e) to twice the precision of T.
template <class T>
inline void split_factor(double beta, T* high, T* low) {
  constexpr double kLog2ERest = 2.0355273740931033e-17;
  const double product = beta * kLog2E;
  *high = static_cast<T>(product);
  *low = static_cast<T>((product - static_cast<double>(*high)) + std::fma(beta, kLog2E, -product) + beta * kLog2ERest);
}

// The operands of one call. u [n, d], v [m, d], contiguous; one_set: v is u.
template <class T>
struct Problem {
  const T *u, *v;
  int64_t n, m, d;
  bool one_set;
  bool unit;  // the caller promises |<u_i, v_j>| <= 1 up to rounding
  double scale;
  std::vector<double> exponents;  // numbers of T
  PairRules pairs;

  // exp(beta s_ij) for unit rows lies between 2^-reach and 2^reach.
  double reach(double beta) const { return beta * scale * kLog2E; }
};

// The exponent range of T that a static shift may use: sums of up to 2^24 terms must stay below the largest number and
// the smallest term of unit rows (rounded to 16 bits: cosines up to 1.008) above the smallest normal one.
template <class T>
struct ExponentRange;
template <>
struct ExponentRange<float> {
  static constexpr double kLowest = -124.0, kHighest = 100.0;
  static constexpr double kProduct = 64.0;  // backward: exp(beta s) times a coefficient that holds exp(-lse)
};
template <>
struct ExponentRange<double> {
  static constexpr double kLowest = -1000.0, kHighest = 900.0;
  static constexpr double kProduct = 480.0;
};

// The shift for terms whose largest logit is `max`: finite, so that an infinite logit gives inf and not NaN; -inf for
// none.
template <class T>
inline T shift_for(T beta, T max) {
  constexpr T kLargest = std::numeric_limits<T>::max() / 4;
  const T shift = beta * max;
  return shift > kLargest ? kLargest : shift;
}

template <class T>
inline T shift_in_use(T shift) {
  return shift == -INFINITY ? T(0) : shift;
}

// Rows per block and columns per tile. 256 x 512 keeps the tile and its operands in L2 up to D = 128; from 128 x 256 to
// 512 x 1024 the difference is within 10 % (docs/measurements.md). Forward and backward must agree: where one negative
// dominates a row, its weight is exact only if both compute the same bits.
inline void choose_tile_sizes(TileGrid& grid) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = 2 * threads > 8 ? 2 * threads : 8;  // the same for 1 to 4 threads, and so are the results
  grid.tile_cols = 512;
  while (grid.tile_cols > 256 && grid.tile_cols >= 2 * grid.cols) grid.tile_cols /= 2;
  grid.block_rows = 256;
  while (grid.block_rows > 32 && grid.block_rows * blocks > grid.rows) grid.block_rows /= 2;
}

// Computes the logits of `range` into s; its pairs are tested only if one of them may have to be ignored.
template <class T>
Tile<T> compute_tile(const Problem<T>& problem, const TileRange& range, T* s, int64_t ld) {
  Tile<T> tile;
  tile.s = s, tile.ld = ld;
  tile.i0 = range.i0, tile.rows = range.i1 - range.i0;
  tile.j0 = range.j0, tile.cols = range.j1 - range.j0;
  tile.pairs = &problem.pairs;
  tile.special = problem.pairs.has_ids() || problem.pairs.may_share_image(range.i0, range.i1, range.j0, range.j1);
  tile.upper = range.upper;
  score_tile(s, ld, problem.scale, problem.u + range.i0 * problem.d, tile.rows, problem.v + range.j0 * problem.d,
             tile.cols, problem.d);
  return tile;
}

}  // namespace contrastive_ext
