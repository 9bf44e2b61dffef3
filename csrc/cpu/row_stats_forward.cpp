// Forward: tiles of logits -> moments where needed -> sums of exponentials -> (shift, sum) of every anchor.
//
// Static shift (unit rows, temperature inside the limit): exp(beta s - shift) with one constant shift, so one
// exponential serves the row and the column. Otherwise the online maximum: rows keep a running one, columns use the
// tile's.
#include "row_stats_forward.h"

#include <algorithm>
#include <limits>

#include "forward_plan.h"

namespace contrastive_ext {
namespace {

template <class T>
class ForwardWorker {
 public:
  ForwardWorker(const Problem<T>& problem, const Plan& plan, const TileGrid& grid, const ForwardResults<T>& results,
                AnchorState<T>& rows, AnchorState<T>& cols)
      : problem_(problem),
        plan_(plan),
        results_(results),
        rows_(rows),
        cols_(cols),
        local_(plan, grid.block_rows, rows.moments()),
        tile_(problem, grid),
        bf16_(problem.bf16, grid.block_rows, grid.tile_cols),
        ld_(tile_.ld()),
        e_(results.mean ? 2 * grid.block_rows * ld_ : 0),
        mean_(results.mean ? static_cast<int64_t>(problem.exponents.size()) * grid.block_rows * problem.d : 0),
        per_row_(6 * padded(grid.block_rows)),
        per_col_((kColumnArrays + 2 * static_cast<int64_t>(plan.passes.size())) * ld_),
        block_rows_(grid.block_rows),
        columns_(grid.column_results) {
    const int64_t rp = padded(grid.block_rows);
    T* r = per_row_.get();
    row_max_ = r, row_moment_ = r + rp, row_shift_ = r + 2 * rp, row_sum_ = r + 3 * rp, row_square_ = r + 4 * rp;
    row_count_ = r + 5 * rp;
    T* c = per_col_.get();
    col_max_ = c, col_moment_ = c + ld_, col_shift_ = c + 2 * ld_, col_count_ = c + 3 * ld_;
  }

  void begin(int64_t, int64_t) { local_ = AnchorState<T>(plan_, block_rows_, rows_.moments()); }

  void compute(const TileRange& range) {
    Tile<T> tile = tile_.compute(range);
    if (columns_) std::fill(col_count_, col_count_ + ld_, T(0));
    tile.row_count = row_count_, tile.col_count = columns_ ? col_count_ : nullptr;
    const auto counted = [&] { tile.row_count = tile.col_count = nullptr; };  // by the first pass
    if (plan_.needs_moments) add_row_moments(tile), counted();
    for (size_t p = 0; p < plan_.passes.size(); ++p)
      add_exponentials(tile, plan_.passes[p], columns_ ? col_sums(p) : nullptr, range.first), counted();
    for (int64_t i = 0; i < tile.rows; ++i) local_.count[i] += static_cast<int64_t>(row_count_[i]);
  }

  void add_columns(const TileRange& range) {
    for (int64_t j = 0; j < range.j1 - range.j0; ++j) {
      const int64_t at = range.j0 + j;
      for (size_t p = 0; p < plan_.passes.size(); ++p) {
        const Pass& pass = plan_.passes[p];
        const T* sums = col_sums(p);
        const double shift = plan_.is_static ? kLn2 * pass.shift2 : shift_for(static_cast<T>(pass.beta), col_max_[j]);
        cols_.stream(pass.stream)[at].add(shift, sums[j]);
        if (pass.square_stream >= 0) cols_.stream(pass.square_stream)[at].add(2 * shift, sums[ld_ + j]);
      }
      cols_.count[at] += static_cast<int64_t>(col_count_[j]);
      if (cols_.moments()) cols_.add_moments(at, col_max_[j], col_moment_[j]);
    }
  }

  void end(int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      for (int k = 0; k < plan_.num_streams; ++k) rows_.stream(k)[i].merge(local_.stream(k)[i - i0]);
      rows_.count[i] += local_.count[i - i0];
      if (rows_.moments()) rows_.add_moments(i, local_.max[i - i0], local_.sum[i - i0]);
    }
    if (results_.mean) store_means(i0, i1);
  }

 private:
  static constexpr int64_t kColumnArrays = 4;  // beside the sums of every pass

  static int64_t padded(int64_t size) { return (size + kColumnPad - 1) / kColumnPad * kColumnPad; }
  T* col_sums(size_t pass) const { return per_col_.get() + (kColumnArrays + 2 * static_cast<int64_t>(pass)) * ld_; }

  void add_row_moments(const Tile<T>& tile) {
    if (columns_) {
      std::fill(col_max_, col_max_ + ld_, static_cast<T>(-INFINITY));
      std::fill(col_moment_, col_moment_ + ld_, T(0));
    }
    tile_kernels<T>().moments(tile,
                              {row_max_, row_moment_, columns_ ? col_max_ : nullptr, columns_ ? col_moment_ : nullptr});
    if (!rows_.moments()) return;
    for (int64_t i = 0; i < tile.rows; ++i) local_.add_moments(i, row_max_[i], row_moment_[i]);
  }

  void add_exponentials(const Tile<T>& tile, const Pass& pass, T* col_sums, bool first) {
    const bool square = pass.square_stream >= 0;
    OnlineLse<double>* rows = local_.stream(pass.stream);
    OnlineLse<double>* squares = square ? local_.stream(pass.square_stream) : nullptr;
    ExpSums<T> sums{};
    sums.beta = static_cast<T>(pass.beta);
    split_factor(pass.beta, &sums.factor, &sums.factor_low);
    sums.shift2 = static_cast<T>(pass.shift2);
    sums.row_sum = row_sum_;
    sums.row_square_sum = square ? row_square_ : nullptr;
    if (col_sums) {
      std::fill(col_sums, col_sums + (square ? 2 : 1) * ld_, T(0));
      sums.col_sum = col_sums;
      sums.col_square_sum = square ? col_sums + ld_ : nullptr;
    }
    if (!plan_.is_static) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const double shift = shift_for(sums.beta, row_max_[i]);
        const double rescale = rows[i].raise(shift);
        if (square) squares[i].raise(2 * shift);
        if (results_.mean && !first && rescale != 1.0) rescale_means(pass, i, rescale);
        row_shift_[i] = shift_in_use(static_cast<T>(rows[i].shift));
      }
      std::fill(row_shift_ + tile.rows, row_shift_ + (tile.rows + kRowStep - 1) / kRowStep * kRowStep, T(0));
      sums.row_shift = row_shift_;
      if (col_sums)
        for (int64_t j = 0; j < ld_; ++j) col_shift_[j] = shift_in_use(shift_for(sums.beta, col_max_[j]));
      sums.col_shift = col_shift_;
    }
    if (results_.mean) sums.e = e_.get(), sums.e_square = e_.get() + block_rows_ * ld_;
    tile_kernels<T>().exp_sums(tile, sums);
    for (int64_t i = 0; i < tile.rows; ++i) {
      rows[i].sum += row_sum_[i];
      if (square) squares[i].sum += row_square_[i];
    }
    if (results_.mean) {
      accumulate_mean(tile, pass.stream, sums.e, first);
      if (square) accumulate_mean(tile, pass.square_stream, sums.e_square, first);
    }
  }

  bool has_mean(int stream) const { return stream >= 0 && stream < static_cast<int>(problem_.exponents.size()); }
  T* mean(int stream, int64_t i) const { return mean_.get() + (stream * block_rows_ + i) * problem_.d; }

  void accumulate_mean(const Tile<T>& tile, int stream, const T* e, bool first) {
    if (!has_mean(stream)) return;
    combine_columns(mean(stream, 0), e, tile, problem_.v + tile.j0 * problem_.d, problem_.d, /*accumulate=*/!first,
                    bf16_);
  }

  void rescale_means(const Pass& pass, int64_t i, double factor) {
    const int streams[] = {pass.stream, pass.square_stream};
    const double factors[] = {factor, factor * factor};
    for (int k = 0; k < 2; ++k)
      if (has_mean(streams[k]))
        for (int64_t c = 0; c < problem_.d; ++c) mean(streams[k], i)[c] *= static_cast<T>(factors[k]);
  }

  void store_means(int64_t i0, int64_t i1) {
    for (int k = 0; k < static_cast<int>(problem_.exponents.size()); ++k)
      for (int64_t i = i0; i < i1; ++i) {
        const double sum = local_.stream(k)[i - i0].sum;
        T* out = results_.mean + (k * problem_.n + i) * problem_.d;
        for (int64_t c = 0; c < problem_.d; ++c) out[c] = sum == 0.0 ? T(0) : static_cast<T>(mean(k, i - i0)[c] / sum);
      }
  }

  const Problem<T>& problem_;
  const Plan& plan_;
  const ForwardResults<T>& results_;
  AnchorState<T>& rows_;
  AnchorState<T>& cols_;
  AnchorState<T> local_;
  TileBuffer<T> tile_;
  Bf16Combiner bf16_;
  int64_t ld_;
  Workspace<T> e_, mean_, per_row_, per_col_;
  int64_t block_rows_;
  bool columns_;
  T *row_max_, *row_moment_, *row_shift_, *row_sum_, *row_square_, *row_count_;
  T *col_max_, *col_moment_, *col_shift_, *col_count_;
};

template <class T>
void sweep_forward(const Problem<T>& problem, const Plan& plan, const ForwardResults<T>& results, bool triangle,
                   AnchorState<T>& rows, AnchorState<T>& cols) {
  TileGrid grid{};
  grid.rows = problem.n, grid.cols = problem.m, grid.depth = problem.d;
  choose_tile_sizes(grid);
  grid.triangle = triangle;
  grid.column_results = triangle || results.col_lse;
  sweep_tiles(grid, [&] { return ForwardWorker<T>(problem, plan, grid, results, rows, cols); });
}

template <class T>
void store_anchor_results(size_t num_exponents, const Plan& plan, AnchorState<T>& state, bool diagnostics, T* lse,
                          T* aux) {
  for (size_t k = 0; k < num_exponents; ++k)
    for (int64_t i = 0; i < state.anchors; ++i)
      lse[static_cast<int64_t>(k) * state.anchors + i] = static_cast<T>(state.stream(static_cast<int>(k))[i].lse());
  for (int64_t i = 0; i < state.anchors; ++i) aux[i] = static_cast<T>(state.count[i]);
  if (state.moments()) std::copy(state.max.begin(), state.max.end(), aux + state.anchors);
  if (!diagnostics) return;
  for (int64_t i = 0; i < state.anchors; ++i) {
    aux[2 * state.anchors + i] = static_cast<T>(state.sum[i]);
    aux[3 * state.anchors + i] = static_cast<T>(state.stream(plan.diagnostic_stream)[i].lse());
  }
}

}  // namespace

template <class T>
void row_stats_forward(const Problem<T>& problem, const ForwardResults<T>& results) {
  const Plan plan = make_plan(problem, results.diagnostics, results.maximum);
  AnchorState<T> rows(plan, problem.n, results.moments());
  AnchorState<T> cols(plan, results.col_lse ? problem.m : 0, results.col_lse && results.moments());
  if (problem.one_set) {
    // The means need every row's whole sweep in one place. The statistics still come from the triangle: s_ij and s_ji
    // may differ in the last bit, and the backward visits the triangle.
    if (results.mean) {
      AnchorState<T> unused(plan, problem.n, results.moments());
      sweep_forward(problem, plan, results, /*triangle=*/false, unused, unused);
    }
    ForwardResults<T> statistics = results;
    statistics.mean = nullptr;
    sweep_forward(problem, plan, statistics, /*triangle=*/true, rows, rows);
  } else {
    sweep_forward(problem, plan, results, /*triangle=*/false, rows, cols);
  }

  store_anchor_results(problem.exponents.size(), plan, rows, results.diagnostics, results.lse, results.aux);
  if (results.col_lse)
    store_anchor_results(problem.exponents.size(), plan, cols, results.diagnostics, results.col_lse, results.col_aux);
}

template void row_stats_forward<float>(const Problem<float>&, const ForwardResults<float>&);
template void row_stats_forward<double>(const Problem<double>&, const ForwardResults<double>&);

}  // namespace contrastive_ext
