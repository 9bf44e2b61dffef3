// Forward: tiles of logits -> softplus and sigmoid of every selected pair -> sums of the rows. Backward: the gradient
// sweep (gradient_sweep.h) with sigmoid weights.
#include "pair_sums.h"

#include <algorithm>

#include "gradient_sweep.h"

namespace contrastive_ext {
namespace {

// What kernels read of every row, padded so that they may take whole strips.
template <class T>
class PerRow {
 public:
  explicit PerRow(int64_t n) : data_(n + kColumnPad) { std::fill(data_.get(), data_.get() + n + kColumnPad, T(0)); }
  T* get() const { return data_.get(); }

 private:
  Workspace<T> data_;
};

template <class T>
class PairSumsWorker {
 public:
  PairSumsWorker(const Problem<T>& problem, const TileGrid& grid, T sign, const T* offset, const PairSumResults<T>& out)
      : sign_(sign),
        offset_(offset),
        out_(out),
        tile_(problem, grid),
        sum_(grid.block_rows),
        slope_(grid.block_rows),
        count_(grid.block_rows) {}

  void begin(int64_t i0, int64_t i1) {
    for (T* result : {out_.sum, out_.slope, out_.count}) std::fill(result + i0, result + i1, T(0));
  }

  void compute(const TileRange& range) {
    Tile<T> tile = tile_.compute(range);
    tile.row_count = count_.get();
    tile_kernels<T>().softplus_sums(tile, {sign_, offset_ + range.i0, sum_.get(), slope_.get()});
    for (int64_t i = 0; i < tile.rows; ++i) {
      out_.sum[range.i0 + i] += sum_.get()[i];
      out_.slope[range.i0 + i] += slope_.get()[i];
      out_.count[range.i0 + i] += count_.get()[i];
    }
  }

  void add_columns(const TileRange&) {}
  void end(int64_t, int64_t) {}

 private:
  T sign_;
  const T* offset_;
  const PairSumResults<T>& out_;
  TileBuffer<T> tile_;
  PerRow<T> sum_, slope_, count_;
};

template <class T>
class SigmoidOfTile {
 public:
  SigmoidOfTile(T sign, const T* offset, const T* coef) : sign_(sign), offset_(offset), coef_(coef) {}

  void operator()(const Tile<T>& tile) const {
    tile_kernels<T>().sigmoid_weights(tile, {sign_, offset_ + tile.i0, coef_ + tile.i0});
  }

 private:
  T sign_;
  const T *offset_, *coef_;
};

}  // namespace

template <class T>
void pair_sums_forward(const Problem<T>& problem, const PairSums<T>& terms, const PairSumResults<T>& results) {
  TileGrid grid{};
  grid.rows = problem.n, grid.cols = problem.m, grid.depth = problem.d;
  choose_tile_sizes(grid);
  const PerRow<T> offset(problem.n);
  std::copy(terms.offset, terms.offset + problem.n, offset.get());
  sweep_tiles(grid, [&] { return PairSumsWorker<T>(problem, grid, terms.sign, offset.get(), results); });
}

template <class T>
void pair_sums_backward(const Problem<T>& problem, const PairSums<T>& terms, const T* grad_sum, T* du, T* dv) {
  TileGrid grid{};
  if (!begin_gradient(problem, grid, du, dv)) return;
  const PerRow<T> offset(problem.n), coef(problem.n);
  std::copy(terms.offset, terms.offset + problem.n, offset.get());
  const T factor = static_cast<T>(problem.scale) * terms.sign;
  for (int64_t i = 0; i < problem.n; ++i) coef.get()[i] = factor * grad_sum[i];
  const SigmoidOfTile<T> weigh(terms.sign, offset.get(), coef.get());
  sweep_tiles(grid, [&] { return GradientWorker<T, SigmoidOfTile<T>>(problem, grid, weigh, du, dv); });
}

template void pair_sums_forward<float>(const Problem<float>&, const PairSums<float>&, const PairSumResults<float>&);
template void pair_sums_forward<double>(const Problem<double>&, const PairSums<double>&, const PairSumResults<double>&);
template void pair_sums_backward<float>(const Problem<float>&, const PairSums<float>&, const float*, float*, float*);
template void pair_sums_backward<double>(const Problem<double>&, const PairSums<double>&, const double*, double*,
                                         double*);

}  // namespace contrastive_ext
