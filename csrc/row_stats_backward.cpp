// Backward: tiles of logits -> weights W in place -> du += W v for the block's rows, dv += W^T u for the tile's
// columns.
//
// Both products share the tile, in triangle form for one set (W is symmetric): 6 N M D flops for two sets, 3 N^2 D for
// one.
#include "row_stats_backward.h"

#include <algorithm>

namespace contrastive_ext {
namespace {

// Per anchor and exponent: coefficient and shift of W's terms, padded so that kernels may load whole vectors.
template <class T>
struct AnchorWeights {
  Workspace<T> data;
  int64_t stride, num_exponents;
  bool wanted;

  AnchorWeights(const Problem<T>& problem, const T* lse, const T* grad_lse, int64_t count, bool shared)
      : data(lse ? 2 * static_cast<int64_t>(problem.exponents.size()) * (count + kColumnPad) : 0),
        stride(count + kColumnPad),
        num_exponents(static_cast<int64_t>(problem.exponents.size())),
        wanted(lse != nullptr) {
    if (!wanted) return;
    for (int64_t k = 0; k < num_exponents; ++k) {
      T *coefs = coef(k), *shifts = shift(k);
      const double factor = problem.scale * problem.exponents[static_cast<size_t>(k)];
      for (int64_t i = 0; i < count; ++i) {
        const T own = lse[k * count + i];
        const bool is_empty = own == -INFINITY;  // no negatives: exp(s - inf) = 0, not NaN
        const double scale = shared ? std::exp(-static_cast<double>(own)) : 1.0;
        coefs[i] = is_empty ? T(0) : static_cast<T>(factor * static_cast<double>(grad_lse[k * count + i]) * scale);
        shifts[i] = is_empty ? static_cast<T>(INFINITY) : own;
      }
      std::fill(coefs + count, coefs + stride, T(0));
      std::fill(shifts + count, shifts + stride, T(0));
    }
  }
  T* coef(int64_t k) const { return data.get() + 2 * k * stride; }
  T* shift(int64_t k) const { return data.get() + (2 * k + 1) * stride; }
};

// Whether one exponential may serve both directions: exp(beta s) and its coefficient, which holds exp(-lse), stay in
// range.
template <class T>
bool can_share(const Problem<T>& problem, bool columns) {
  if (!problem.unit || !columns) return false;
  for (double beta : problem.exponents)
    if (!(problem.reach(beta) <= ExponentRange<T>::kProduct)) return false;
  return true;
}

template <class T>
class BackwardWorker {
 public:
  BackwardWorker(const Problem<T>& problem, const TileGrid& grid, const Weights<T>& exponents,
                 const AnchorWeights<T>& rows, const AnchorWeights<T>& cols, T* du, T* dv)
      : problem_(problem),
        exponents_(exponents),
        rows_(rows),
        cols_(cols),
        triangle_(grid.triangle),
        du_(du),
        dv_(dv),
        tile_(problem, grid),
        block_du_(grid.triangle ? grid.block_rows * problem.d : 0) {}

  void begin(int64_t, int64_t) {}

  void compute(const TileRange& range) {
    const Tile<T> tile = tile_.compute(range);
    Weights<T> weights = exponents_;
    for (int k = 0; k < weights.num_exponents; ++k) {
      weights.row_coef[k] = rows_.coef(k) + range.i0, weights.row_shift[k] = rows_.shift(k) + range.i0;
      if (cols_.wanted)
        weights.col_coef[k] = cols_.coef(k) + range.j0, weights.col_shift[k] = cols_.shift(k) + range.j0;
    }
    tile_kernels<T>().weights(tile, weights);
    if (du_)
      combine_columns(block_du(range.i0), tile.s, tile.ld, tile.rows, problem_.v + range.j0 * problem_.d, tile.cols,
                      problem_.d, /*accumulate=*/!range.first);
  }

  // The first block sees every column first: it writes, the others add.
  void add_columns(const TileRange& range) {
    const int64_t d = problem_.d;
    combine_rows((triangle_ ? du_ : dv_) + range.j0 * d, tile_.logits(), tile_.ld(), range.i1 - range.i0,
                 problem_.u + range.i0 * d, range.j1 - range.j0, d,
                 /*accumulate=*/range.i0 > 0);
  }

  void end(int64_t i0, int64_t i1) {
    if (!triangle_) return;
    const T* block = block_du_.get();
    T* out = du_ + i0 * problem_.d;
    for (int64_t c = 0; c < (i1 - i0) * problem_.d; ++c) out[c] += block[c];
  }

 private:
  // In the triangle other blocks may still add to these rows as columns, so the block's own sum stands apart until the
  // end.
  T* block_du(int64_t i0) const { return triangle_ ? block_du_.get() : du_ + i0 * problem_.d; }

  const Problem<T>& problem_;
  const Weights<T>& exponents_;
  const AnchorWeights<T>&rows_, &cols_;
  bool triangle_;
  T *du_, *dv_;
  TileBuffer<T> tile_;
  Workspace<T> block_du_;
};

}  // namespace

template <class T>
void row_stats_backward(const Problem<T>& problem, const BackwardInputs<T>& in, T* du, T* dv) {
  TileGrid grid{};
  grid.rows = problem.n, grid.cols = problem.m, grid.depth = problem.d;
  choose_tile_sizes(grid);
  grid.triangle = problem.one_set;
  grid.column_results = grid.triangle || dv;
  if (du && problem.m == 0) std::fill(du, du + problem.n * problem.d, T(0));
  if (dv && problem.n == 0) std::fill(dv, dv + problem.m * problem.d, T(0));
  if (problem.n == 0 || problem.m == 0) return;

  const bool columns = problem.one_set || in.grad_col_lse;
  Weights<T> exponents{};
  exponents.num_exponents = static_cast<int>(problem.exponents.size());
  exponents.shared = can_share(problem, columns);
  exponents.square = exponents.num_exponents == 2 && problem.exponents[1] == 2.0 * problem.exponents[0];
  for (int k = 0; k < exponents.num_exponents; ++k) {
    exponents.beta[k] = static_cast<T>(problem.exponents[static_cast<size_t>(k)]);
    split_factor(problem.exponents[static_cast<size_t>(k)], &exponents.factor[k], &exponents.factor_low[k]);
  }

  const AnchorWeights<T> rows(problem, in.lse, in.grad_lse, problem.n, exponents.shared);
  const AnchorWeights<T> own_cols(problem, columns && !problem.one_set ? in.col_lse : nullptr, in.grad_col_lse,
                                  problem.m, exponents.shared);
  const AnchorWeights<T>& cols = problem.one_set ? rows : own_cols;
  sweep_tiles(grid, [&] { return BackwardWorker<T>(problem, grid, exponents, rows, cols, du, dv); });
}

template void row_stats_backward<float>(const Problem<float>&, const BackwardInputs<float>&, float*, float*);
template void row_stats_backward<double>(const Problem<double>&, const BackwardInputs<double>&, double*, double*);

}  // namespace contrastive_ext
