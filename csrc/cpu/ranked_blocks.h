// Forward blocks of whole rows: what exact and histogram ranks share.
#pragma once

#include <algorithm>

#include "../online_lse.h"
#include "ranked_stats.h"
#include "row_stats.h"

namespace contrastive_ext {

// Blocks of whole rows. The resident logits of a thread stay below 16 MiB (one strip of rows where that is more); 64
// rows are enough for the products.
inline void choose_row_blocks(TileGrid& grid) {
  constexpr int64_t kElements = int64_t{1} << 22;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = 2 * threads > 8 ? 2 * threads : 8;  // as in choose_tile_sizes
  grid.tile_cols = grid.cols;
  grid.block_rows = 64;
  while (grid.block_rows > kRowStep && grid.block_rows * grid.cols > kElements) grid.block_rows /= 2;
  while (grid.block_rows > kRowStep && grid.block_rows * blocks > grid.rows) grid.block_rows /= 2;
}

// The grid of a forward over blocks of whole rows. False when there is nothing to sweep.
template <class T>
bool begin_blocks(const Problem<T>& problem, const RankRule& rule, TileGrid& grid, const RankedResults<T>& results) {
  grid.rows = problem.n, grid.cols = problem.m, grid.depth = problem.d;
  choose_row_blocks(grid);
  if (problem.n > 0 && problem.m > 0) return true;
  for (int64_t statistic = 0; statistic < (results.diagnostics ? 6 : 1); ++statistic)
    std::fill_n(results.aux + statistic * problem.n, problem.n,
                static_cast<T>(statistic == 1 || statistic == 3 ? -INFINITY : 0));
  std::fill_n(results.lse, problem.n, static_cast<T>(-INFINITY));
  if (rule.bins) {
    std::fill_n(results.axis, 3 * problem.n, T(0));
    std::fill_n(results.below, problem.n * (rule.bins + 1), T(0));
  }
  return false;
}

constexpr int64_t kPartCols = 512;

// Calls f(part) for parts of whole rows that the kernels can classify.
template <class T, class F>
void for_each_part(const Tile<T>& tile, const F& f) {
  for (int64_t j = 0; j < tile.cols; j += kPartCols) {
    Tile<T> part = tile;
    part.s += j, part.j0 += j;
    part.cols = std::min(kPartCols, tile.cols - j);
    if (part.gate) part.gate += j;
    if (part.col_limit) part.col_limit += j;
    part.special = may_ignore_pairs(part);
    f(part);
  }
}

// `count` rows of a tile from `row` on.
template <class T>
Tile<T> rows_of(const Tile<T>& tile, int64_t row, int64_t count) {
  Tile<T> rows = tile;
  rows.s += row * tile.ld, rows.i0 += row, rows.rows = count;
  if (rows.gate) rows.gate += row * tile.ld, rows.row_limit += row;
  return rows;
}

// Calls f(strip) for kRowStep rows of a block at a time: what several passes read stays in L2.
template <class T, class F>
void for_each_strip_of_rows(const Tile<T>& tile, const F& f) {
  for (int64_t row = 0; row < tile.rows; row += kRowStep) f(rows_of(tile, row, std::min(kRowStep, tile.rows - row)));
}

// Over the negatives of every row of a strip; without any the lowest is above the highest.
template <class T>
struct Extent {
  T lowest[kRowStep], highest[kRowStep];
  int64_t negatives[kRowStep] = {};

  explicit Extent(Tile<T> strip) {
    T part_min[kRowStep], part_max[kRowStep], part_count[kRowStep];
    strip.row_count = part_count;
    for (int64_t r = 0; r < kRowStep; ++r) lowest[r] = INFINITY, highest[r] = -INFINITY;
    for_each_part(strip, [&](const Tile<T>& part) {
      tile_kernels<T>().extremes(part, {part_min, part_max});
      for (int64_t r = 0; r < strip.rows; ++r) {
        lowest[r] = std::min(lowest[r], part_min[r]), highest[r] = std::max(highest[r], part_max[r]);
        negatives[r] += static_cast<int64_t>(part_count[r]);
      }
    });
  }
};

// Per row of a strip.
template <class T>
struct StripSums {
  alignas(64) T max[kRowStep], total[kRowStep], shift[kRowStep], part[kRowStep], part_square[kRowStep];
  double sum[kRowStep], square[kRowStep];
};

template <class T>
class ForwardBlocks {
 public:
  ForwardBlocks(const Problem<T>& problem, const TileGrid& grid, const RankedResults<T>& results)
      : problem_(problem), results_(results), block_(problem, grid) {}

  void begin(int64_t, int64_t) {}
  void add_columns(const TileRange&) {}
  void end(int64_t, int64_t) {}

 protected:
  // Largest logit and sum of logits of every row of a strip.
  void find_moments(const Tile<T>& strip, StripSums<T>& rows) const {
    for (int64_t r = 0; r < kRowStep; ++r) rows.max[r] = -INFINITY, rows.sum[r] = 0;
    for_each_part(strip, [&](const Tile<T>& part) {
      tile_kernels<T>().moments(part, {rows.part, rows.total, nullptr, nullptr});
      for (int64_t r = 0; r < strip.rows; ++r) {
        if (rows.part[r] > rows.max[r]) rows.max[r] = rows.part[r];
        rows.sum[r] += rows.total[r];
      }
    });
  }
  void use_max_as_shift(StripSums<T>& rows) const {
    for (int64_t r = 0; r < kRowStep; ++r) {
      rows.shift[r] = shift_in_use(shift_for(T(1), rows.max[r]));
      rows.sum[r] = rows.square[r] = 0;
    }
  }
  void store_moments(const Tile<T>& strip, const StripSums<T>& rows) const {
    for (int64_t r = 0; r < strip.rows; ++r) {
      aux(1, strip.i0 + r) = rows.max[r];
      aux(2, strip.i0 + r) = static_cast<T>(rows.sum[r]);
    }
  }
  void store_sums(const Tile<T>& strip, const StripSums<T>& rows) const {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const double shift = rows.shift[r];
      results_.lse[strip.i0 + r] = static_cast<T>(OnlineLse<double>{rows.sum[r], shift}.lse());
      if (results_.diagnostics)
        aux(3, strip.i0 + r) = static_cast<T>(OnlineLse<double>{rows.square[r], 2 * shift}.lse());
    }
  }
  T& aux(int64_t statistic, int64_t i) const { return results_.aux[statistic * problem_.n + i]; }

  const Problem<T>& problem_;
  const RankedResults<T>& results_;
  TileBuffer<T> block_;
};

}  // namespace contrastive_ext
