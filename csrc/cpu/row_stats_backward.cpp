// Backward: the gradient sweep (gradient_sweep.h) with the weights of log-sum-exps.
#include "row_stats_backward.h"

#include "gradient_sweep.h"

namespace contrastive_ext {
namespace {

// The weights of log-sum-exps at one or two exponents.
template <class T>
class LseWeights {
 public:
  LseWeights(const Weights<T>& exponents, const AnchorWeights<T>& rows, const AnchorWeights<T>& cols)
      : exponents_(exponents), rows_(rows), cols_(cols) {}

  void operator()(const Tile<T>& tile) const {
    Weights<T> weights = exponents_;
    for (int k = 0; k < weights.num_exponents; ++k) {
      weights.row_coef[k] = rows_.coef(k) + tile.i0, weights.row_shift[k] = rows_.shift(k) + tile.i0;
      if (cols_.wanted) weights.col_coef[k] = cols_.coef(k) + tile.j0, weights.col_shift[k] = cols_.shift(k) + tile.j0;
    }
    tile_kernels<T>().weights(tile, weights);
  }

 private:
  const Weights<T>& exponents_;
  const AnchorWeights<T>&rows_, &cols_;
};

}  // namespace

template <class T>
void row_stats_backward(const Problem<T>& problem, const BackwardInputs<T>& in, T* du, T* dv) {
  TileGrid grid{};
  if (!begin_gradient(problem, grid, du, dv)) return;

  const bool columns = problem.one_set || in.grad_col_lse;
  AnchorWeights<T> rows(problem, in.lse, in.grad_lse, problem.n);
  AnchorWeights<T> own_cols(problem, columns && !problem.one_set ? in.col_lse : nullptr, in.grad_col_lse, problem.m);
  Weights<T> exponents{};
  exponents.num_exponents = static_cast<int>(problem.exponents.size());
  exponents.shared = fill_weights(problem, rows, own_cols, columns);
  exponents.square = exponents.num_exponents == 2 && problem.exponents[1] == 2.0 * problem.exponents[0];
  for (int k = 0; k < exponents.num_exponents; ++k) {
    exponents.beta[k] = static_cast<T>(problem.exponents[static_cast<size_t>(k)]);
    split_factor(problem.exponents[static_cast<size_t>(k)], &exponents.factor[k], &exponents.factor_low[k]);
  }

  const AnchorWeights<T>& cols = problem.one_set ? rows : own_cols;
  const LseWeights<T> weigh(exponents, rows, cols);
  sweep_tiles(grid, [&] { return GradientWorker<T, LseWeights<T>>(problem, grid, weigh, du, dv); });
}

template void row_stats_backward<float>(const Problem<float>&, const BackwardInputs<float>&, float*, float*);
template void row_stats_backward<double>(const Problem<double>&, const BackwardInputs<double>&, double*, double*);

}  // namespace contrastive_ext
