// What every backward shares: tiles of logits -> weights W in place -> du += W v for the block's rows, dv += W^T u for
// the tile's columns.
//
// Both products share the tile, in triangle form for one set if W serves both directions: 6 N M D flops for two sets,
// 3 N^2 D for one. What W is, is the business of a functor.
#pragma once

#include <algorithm>
#include <utility>

#include "row_stats.h"

namespace contrastive_ext {

// Per anchor and exponent: coefficient and shift of W's terms, padded so that kernels may load whole vectors.
template <class T>
class AnchorWeights {
 public:
  // lse null: these anchors are not wanted.
  AnchorWeights(const Problem<T>& problem, const T* lse, const T* grad_lse, int64_t count)
      : wanted(lse != nullptr),
        problem_(problem),
        lse_(lse),
        grad_lse_(grad_lse),
        count_(count),
        stride_(count + kColumnPad),
        data_(lse ? 2 * static_cast<int64_t>(problem.exponents.size()) * stride_ : 0) {}

  // Makes the coefficients, with `shared` times exp(-lse). Whether all are numbers of full precision: an upstream
  // gradient near the ends of the range of T may take such a product beyond them.
  bool fill(bool shared) {
    bool in_range = true;
    for (size_t k = 0; wanted && k < problem_.exponents.size(); ++k) {
      T *coefs = coef(k), *shifts = shift(k);
      const double factor = problem_.scale * problem_.exponents[k];
      for (int64_t i = 0; i < count_; ++i) {
        const T own = lse_[static_cast<int64_t>(k) * count_ + i];
        const bool is_empty = own == -INFINITY;  // no negatives: exp(s - inf) = 0, not NaN
        const double scale = shared ? std::exp(-static_cast<double>(own)) : 1.0;
        const double value = factor * static_cast<double>(grad_lse_[static_cast<int64_t>(k) * count_ + i]) * scale;
        coefs[i] = is_empty ? T(0) : static_cast<T>(value);
        shifts[i] = is_empty ? static_cast<T>(INFINITY) : own;
        in_range &= is_empty || value == 0.0 || std::isnormal(coefs[i]);
      }
      std::fill(coefs + count_, coefs + stride_, T(0));
      std::fill(shifts + count_, shifts + stride_, T(0));
    }
    return in_range;
  }
  T* coef(size_t k) const { return data_.get() + 2 * static_cast<int64_t>(k) * stride_; }
  T* shift(size_t k) const { return coef(k) + stride_; }

  const bool wanted;

 private:
  const Problem<T>& problem_;
  const T *lse_, *grad_lse_;
  int64_t count_, stride_;
  Workspace<T> data_;
};

// Makes the weights of rows and of columns. True: one exponential may serve both directions, because exp(beta s) and
// its coefficients, which then hold exp(-lse), stay in range.
template <class T>
bool fill_weights(const Problem<T>& problem, AnchorWeights<T>& rows, AnchorWeights<T>& cols, bool columns) {
  bool shared = problem.unit && columns;
  for (double beta : problem.exponents) shared = shared && problem.reach(beta) <= ExponentRange<T>::kProduct;
  if (shared && rows.fill(true) && cols.fill(true)) return true;
  rows.fill(false), cols.fill(false);
  return false;
}

// `weigh` puts the weights W in place of a tile's logits.
template <class T, class Weigh>
class GradientWorker {
 public:
  GradientWorker(const Problem<T>& problem, const TileGrid& grid, Weigh weigh, T* du, T* dv)
      : problem_(problem),
        weigh_(std::move(weigh)),
        triangle_(grid.triangle),
        du_(du),
        dv_(dv),
        buffer_(problem, grid),
        bf16_(problem.bf16, grid.block_rows, grid.tile_cols),
        block_du_(problem.one_set ? grid.block_rows * problem.d : 0) {}

  void begin(int64_t, int64_t) {}

  void compute(const TileRange& range) {
    tile_ = buffer_.compute(range);
    weigh_(tile_);
    if (du_)
      combine_columns(block_du(range.i0), tile_.s, tile_, problem_.v + range.j0 * problem_.d, problem_.d,
                      /*accumulate=*/!range.first, bf16_);
  }

  // The first block sees every column first: it writes, the others add.
  void add_columns(const TileRange& range) {
    const int64_t d = problem_.d;
    combine_rows((problem_.one_set ? du_ : dv_) + range.j0 * d, tile_, problem_.u + range.i0 * d, d,
                 /*accumulate=*/range.i0 > 0, bf16_);
    // one tile spans all columns: its turn is the time when nobody else adds to these rows
    if (problem_.one_set && !triangle_) add_block(range.i0, range.i1);
  }

  void end(int64_t i0, int64_t i1) {
    if (triangle_) add_block(i0, i1);
  }

 private:
  // With one set other blocks may still add to these rows as columns, so the block's own sum stands apart until then.
  T* block_du(int64_t i0) const { return problem_.one_set ? block_du_.get() : du_ + i0 * problem_.d; }

  void add_block(int64_t i0, int64_t i1) {
    const T* block = block_du_.get();
    T* out = du_ + i0 * problem_.d;
    for (int64_t c = 0; c < (i1 - i0) * problem_.d; ++c) out[c] += block[c];
  }

  const Problem<T>& problem_;
  Weigh weigh_;
  bool triangle_;
  T *du_, *dv_;
  TileBuffer<T> buffer_;
  Bf16Combiner bf16_;
  Tile<T> tile_{};
  Workspace<T> block_du_;
};

// The grid of a gradient over the core's tiles, in triangle form for one set. False when there is nothing to sweep; the
// gradients are 0 then.
template <class T>
bool begin_gradient(const Problem<T>& problem, TileGrid& grid, T* du, T* dv) {
  grid.rows = problem.n, grid.cols = problem.m, grid.depth = problem.d;
  choose_tile_sizes(grid);
  grid.triangle = problem.one_set;
  grid.column_results = grid.triangle || dv;
  if (du && problem.m == 0) std::fill(du, du + problem.n * problem.d, T(0));
  if (dv && problem.n == 0) std::fill(dv, dv + problem.m * problem.d, T(0));
  return problem.n > 0 && problem.m > 0;
}

}  // namespace contrastive_ext
