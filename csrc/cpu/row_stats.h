// What the two directions of the row statistics share: the request, the instruction-set-independent tile sizes, the
// choice between static shift and online maximum.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../compat.h"
#include "../exponent_range.h"
#include "../pairs.h"
#include "scorers.h"
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

// A guide that ignores pairs: column j where score_ij > row_limit_i, and as anchor row i where score_ij > col_limit_j.
template <class T>
struct Gate {
  Scorers<T> scorers{};
  const T* row_limit = nullptr;  // [n]
  std::vector<T> col_limit;      // [m + kColumnPad], empty where columns are no anchors

  explicit operator bool() const { return scorers.count > 0; }
};

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
  Gate<T> gate;
  bool split_products = false;  // those of float32 numbers in bf16 parts (bf16_operands.h)
  // u and v again, as products read them
  Bf16Operands bf16{u, n, v, m, d, one_set, split_products};
  Panels<T> columns = bf16 ? Panels<T>() : Panels<T>(v, m, d);

  // exp(beta s_ij) for unit rows lies between 2^-reach and 2^reach.
  double reach(double beta) const { return beta * scale * kLog2E; }
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
  const int64_t blocks = 2 * threads > 8 ? 2 * threads : 8;  // the same for 1 to 4 threads, and so is the order of sums
  grid.tile_cols = 512;
  while (grid.tile_cols > 256 && grid.tile_cols >= 2 * grid.cols) grid.tile_cols /= 2;
  grid.block_rows = 256;
  while (grid.block_rows > 32 && grid.block_rows * blocks > grid.rows) grid.block_rows /= 2;
}

// Whether a pair of the tile may have to be ignored.
template <class T>
inline bool may_ignore_pairs(const Tile<T>& tile) {
  return tile.gate || tile.pairs->has_tables() ||
         tile.pairs->may_share_image(tile.i0, tile.i0 + tile.rows, tile.j0, tile.j0 + tile.cols);
}

// One thread's tile: its logits, and the guide's scores where there is a gate.
template <class T>
class TileBuffer {
 public:
  TileBuffer(const Problem<T>& problem, const TileGrid& grid)
      : problem_(problem),
        ld_(padded_to(kColumnPad, grid.tile_cols) + kVectorPad),  // rows a power of two apart would share cache lines
        size_(grid.block_rows * ld_),
        s_(size_),
        gate_(problem.gate ? (problem.gate.scorers.count > 1 ? 2 : 1) * size_ : 0) {}

  int64_t ld() const { return ld_; }

  Tile<T> compute(const TileRange& range) const {
    const Gate<T>& gate = problem_.gate;
    Tile<T> tile{};
    tile.s = s_.get(), tile.ld = ld_;
    tile.i0 = range.i0, tile.rows = range.i1 - range.i0;
    tile.j0 = range.j0, tile.cols = range.j1 - range.j0;
    tile.pairs = &problem_.pairs, tile.upper = range.upper;
    multiply_tile(tile);
    if (gate) {
      best_score_tile(gate.scorers, range.i0, range.i1, range.j0, range.j1, gate_.get(), gate_.get() + size_, ld_);
      tile.gate = gate_.get();
      tile.row_limit = gate.row_limit + tile.i0;
      tile.col_limit = gate.col_limit.empty() ? nullptr : gate.col_limit.data() + tile.j0;
    }
    tile.special = may_ignore_pairs(tile);
    return tile;
  }

 private:
  void multiply_tile(const Tile<T>& tile) const {
    if constexpr (std::is_same_v<T, float>)
      if (problem_.bf16)
        return problem_.bf16.scores(tile.s, ld_, problem_.scale, tile.i0, tile.rows, tile.j0, tile.cols, tile.upper,
                                    tile.j0 - tile.i0);
    score_tile(tile.s, ld_, problem_.scale, problem_.u + tile.i0 * problem_.d, tile.rows, problem_.columns, tile.j0,
               tile.cols, problem_.d, tile.upper, tile.j0 - tile.i0);
  }

  const Problem<T>& problem_;
  int64_t ld_, size_;
  Workspace<T> s_, gate_;
};

}  // namespace contrastive_ext
