// Histogram ranks: a block of whole rows is counted into bins over its own range and summed; the bins stay, and the
// backward is the core's gradient sweep with the weights of both anchors of a pair interpolated in them.
#include "gradient_sweep.h"
#include "ranked_blocks.h"

namespace contrastive_ext {
namespace {

// The histograms of all anchors: axis [3, n] and below [n, bins + 1] as the operator returns them, the axis padded so
// that kernels may load whole vectors.
template <class T>
class HistogramTable {
 public:
  HistogramTable(const T* axis, const T* below, int64_t n, int64_t bins)
      : stride_(n + kColumnPad), bins_(bins), below_(below), axis_(4 * stride_) {
    for (int64_t part = 0; part < 3; ++part) {
      std::copy(axis + part * n, axis + (part + 1) * n, axis_.get() + part * stride_);
      std::fill(axis_.get() + part * stride_ + n, axis_.get() + (part + 1) * stride_, T(0));
    }
    for (int64_t i = 0; i < stride_; ++i)
      axis_.get()[3 * stride_ + i] = 1 / std::max(T(1), axis_.get()[2 * stride_ + i]);
  }
  Histograms<T> from(int64_t anchor) const {
    const T* axis = axis_.get() + anchor;
    return {bins_, below_ + anchor * (bins_ + 1), axis, axis + stride_, axis + 2 * stride_, axis + 3 * stride_};
  }

 private:
  int64_t stride_, bins_;
  const T* below_;
  Workspace<T> axis_;
};

template <class T>
class HistogramForward : public ForwardBlocks<T> {
 public:
  HistogramForward(const Problem<T>& problem, const RankRule& rule, const TileGrid& grid,
                   const RankedResults<T>& results)
      : ForwardBlocks<T>(problem, grid, results), rule_(rule), counts_(static_cast<size_t>(2 * kRowStep * rule.bins)) {}

  void compute(const TileRange& range) {
    for_each_strip_of_rows(this->block_.compute(range), [&](const Tile<T>& strip) {
      StripSums<T> rows;
      if (this->results_.diagnostics) {
        this->find_moments(strip, rows);
        this->store_moments(strip, rows);
      }
      find_range(strip, rows);
      count(strip);
      this->use_max_as_shift(rows);
      add_weighted(strip, rows);
      this->store_sums(strip, rows);
    });
  }

 private:
  // histogram_axis of contrastive_ext/problem/ranking.py
  void find_range(const Tile<T>& strip, StripSums<T>& rows) {
    const Extent<T> extent(strip);
    constexpr T kSlack = 16 * std::numeric_limits<T>::epsilon();
    const T bins = static_cast<T>(rule_.bins);
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t i = strip.i0 + r;
      T lowest = extent.lowest[r];
      const T highest = rows.max[r] = extent.highest[r];
      T largest = std::max(std::abs(lowest), std::abs(highest));
      if (!(highest - lowest > kSlack * largest) || !(largest < INFINITY)) largest += 1, lowest = highest - largest;
      low_[r] = axis(0, i) = lowest;
      per_logit_[r] = axis(1, i) = bins / (highest - kSlack * largest - lowest);
      this->aux(0, i) = static_cast<T>(extent.negatives[r]);
      count_[r] = axis(2, i) = std::max(T(1), this->aux(0, i));
      inverse_count_[r] = 1 / count_[r];
    }
  }

  void count(const Tile<T>& strip) {
    std::fill(counts_.begin(), counts_.end(), 0);
    for_each_part(strip, [&](const Tile<T>& part) {
      tile_kernels<T>().bin_counts(part, {rule_.bins, low_, per_logit_, counts_.data()});
    });
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int32_t* counts = counts_.data() + r * 2 * rule_.bins;
      T* below = this->results_.below + (strip.i0 + r) * (rule_.bins + 1);
      int64_t lower = 0;
      for (int64_t k = 0; k < rule_.bins; ++k) {
        below[k] = static_cast<T>(lower);
        lower += counts[2 * k] + counts[2 * k + 1];
      }
      below[rule_.bins] = static_cast<T>(lower);
    }
  }

  void add_weighted(const Tile<T>& strip, StripSums<T>& rows) {
    sum_weighted(strip, rows, nullptr);
    // the largest logit may weigh next to nothing, and what matters lie below the range of exponentials relative to it
    constexpr double kSmall = 0x1p-40;
    if (std::none_of(rows.sum, rows.sum + strip.rows, [](double sum) { return sum < kSmall; })) return;
    T term_max[kRowStep];
    sum_weighted(strip, rows, term_max);
    for (int64_t r = 0; r < strip.rows; ++r)
      if (rows.sum[r] < kSmall && term_max[r] > -INFINITY) rows.shift[r] = term_max[r];
    sum_weighted(strip, rows, nullptr);
  }

  // term_max null: not wanted.
  void sum_weighted(const Tile<T>& strip, StripSums<T>& rows, T* term_max) {
    T weights[kRowStep], largest[kRowStep], top[kRowStep];
    double weight_sum[kRowStep] = {};
    T weight_max[kRowStep] = {};
    for (int64_t r = 0; r < kRowStep; ++r) rows.sum[r] = rows.square[r] = 0;
    for (int64_t r = 0; term_max && r < kRowStep; ++r) term_max[r] = -INFINITY;
    const Histograms<T> table{
        rule_.bins, this->results_.below + strip.i0 * (rule_.bins + 1), low_, per_logit_, count_, inverse_count_};
    for_each_part(strip, [&](const Tile<T>& part) {
      tile_kernels<T>().ranked_sums(part, {rule_.shape<T>(), table, rows.shift, rows.part, rows.part_square, weights,
                                           largest, term_max ? top : nullptr});
      for (int64_t r = 0; r < strip.rows; ++r) {
        rows.sum[r] += rows.part[r], rows.square[r] += rows.part_square[r];
        weight_sum[r] += weights[r], weight_max[r] = std::max(weight_max[r], largest[r]);
        if (term_max) term_max[r] = std::max(term_max[r], top[r]);
      }
    });
    if (!this->results_.diagnostics) return;
    for (int64_t r = 0; r < strip.rows; ++r) {
      this->aux(4, strip.i0 + r) = static_cast<T>(weight_sum[r]);
      this->aux(5, strip.i0 + r) = weight_max[r];
    }
  }

  T& axis(int64_t part, int64_t i) const { return this->results_.axis[part * this->problem_.n + i]; }

  const RankRule& rule_;
  std::vector<int32_t> counts_;
  T low_[kRowStep], per_logit_[kRowStep], count_[kRowStep], inverse_count_[kRowStep];
};

template <class T>
class HistogramGradient {
 public:
  HistogramGradient(const RankedWeights<T>& common, const HistogramTable<T>& table, const AnchorWeights<T>& anchors,
                    bool one_set)
      : common_(common), table_(table), anchors_(anchors), one_set_(one_set) {}

  void operator()(const Tile<T>& tile) const {
    RankedWeights<T> weights = common_;
    weights.rows = table_.from(tile.i0);
    weights.row_coef = anchors_.coef(0) + tile.i0, weights.row_shift = anchors_.shift(0) + tile.i0;
    if (one_set_) {
      weights.cols = table_.from(tile.j0);
      weights.col_coef = anchors_.coef(0) + tile.j0, weights.col_shift = anchors_.shift(0) + tile.j0;
    }
    tile_kernels<T>().ranked_weights(tile, weights);
  }

 private:
  const RankedWeights<T>& common_;
  const HistogramTable<T>& table_;
  const AnchorWeights<T>& anchors_;
  bool one_set_;
};

}  // namespace

template <class T>
void histogram_ranks_forward(const Problem<T>& problem, const RankRule& rule, const RankedResults<T>& results) {
  TileGrid grid{};
  if (!begin_blocks(problem, rule, grid, results)) return;
  sweep_tiles(grid, [&] { return HistogramForward<T>(problem, rule, grid, results); });
}

template <class T>
void histogram_ranks_backward(const Problem<T>& problem, const RankRule& rule, const RankedInputs<T>& in, T* du,
                              T* dv) {
  TileGrid grid{};
  if (!begin_gradient(problem, grid, du, dv)) return;
  RankedWeights<T> common{};
  common.shape = rule.shape<T>();
  AnchorWeights<T> anchors(problem, in.lse, in.grad_lse, problem.n);
  AnchorWeights<T> no_columns(problem, nullptr, nullptr, 0);
  common.shared = fill_weights(problem, anchors, no_columns, problem.one_set);
  split_factor(1.0, &common.factor, &common.factor_low);
  const HistogramTable<T> table(in.axis, in.below, problem.n, rule.bins);
  const HistogramGradient<T> weigh(common, table, anchors, problem.one_set);
  sweep_tiles(grid, [&] { return GradientWorker<T, HistogramGradient<T>>(problem, grid, weigh, du, dv); });
}

template void histogram_ranks_forward<float>(const Problem<float>&, const RankRule&, const RankedResults<float>&);
template void histogram_ranks_forward<double>(const Problem<double>&, const RankRule&, const RankedResults<double>&);
template void histogram_ranks_backward<float>(const Problem<float>&, const RankRule&, const RankedInputs<float>&,
                                              float*, float*);
template void histogram_ranks_backward<double>(const Problem<double>&, const RankRule&, const RankedInputs<double>&,
                                               double*, double*);

}  // namespace contrastive_ext
