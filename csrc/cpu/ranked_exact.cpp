// Exact ranks: sort every row, add log omega to its logits, leave the rest to the kernels of the plain statistics.
#include "gradient_sweep.h"
#include "ranked_blocks.h"
#include "ranking.h"

namespace contrastive_ext {
namespace {

// Adds log omega to the logit of every negative of a strip of whole rows.
template <class T>
class ExactRanks {
 public:
  ExactRanks(const Problem<T>& problem, const RankRule& rule)
      : columns_(padded_to(kColumnPad, problem.m)),
        keys_(kRowStep * columns_),
        ranks_(problem.m),
        weights_(rule.shape<T>()) {}

  // Null: not wanted.
  void operator()(const Tile<T>& strip, T* counts = nullptr, T* weight_sum = nullptr, T* weight_max = nullptr) {
    const Extent<T> extent(strip);
    find_keys(strip, extent);
    for (int64_t row = 0; row < strip.rows; ++row) {
      T* s = strip.s + row * strip.ld;
      const T* log_weight = weights_.of(extent.negatives[row]).data();
      const int32_t* keys = keys_.get() + row * columns_;
      if (counts) counts[row] = static_cast<T>(extent.negatives[row]);
      if (!weight_sum) {
        ranks_.for_each(keys, s, strip.cols, [&](int64_t column, int64_t rank) { s[column] += log_weight[rank - 1]; });
        continue;
      }
      double sum = 0;
      T largest = 0;
      ranks_.for_each(keys, s, strip.cols, [&](int64_t column, int64_t rank) {
        s[column] += log_weight[rank - 1];
        const T weight = std::exp(log_weight[rank - 1]);
        sum += static_cast<double>(weight), largest = std::max(largest, weight);
      });
      weight_sum[row] = static_cast<T>(sum), weight_max[row] = largest;
    }
  }

 private:
  void find_keys(const Tile<T>& strip, const Extent<T>& extent) {
    T per_logit[kRowStep];
    for (int64_t r = 0; r < kRowStep; ++r)
      per_logit[r] = static_cast<T>(ranks_.steps()) / (extent.highest[r] - extent.lowest[r]);
    for_each_part(strip, [&](const Tile<T>& part) {
      int32_t* keys = keys_.get() + (part.j0 - strip.j0);
      tile_kernels<T>().rank_keys(part, {ranks_.steps(), extent.lowest, per_logit, keys, columns_});
    });
  }

  int64_t columns_;
  Workspace<int32_t> keys_;
  RowRanks<T> ranks_;
  LogWeights<T> weights_;
};

template <class T>
class ExactForward : public ForwardBlocks<T> {
 public:
  ExactForward(const Problem<T>& problem, const RankRule& rule, const TileGrid& grid, const RankedResults<T>& results)
      : ForwardBlocks<T>(problem, grid, results), ranks_(problem, rule) {}

  void compute(const TileRange& range) {
    const bool diagnostics = this->results_.diagnostics;
    for_each_strip_of_rows(this->block_.compute(range), [&](const Tile<T>& strip) {
      StripSums<T> rows;
      if (diagnostics) {
        this->find_moments(strip, rows);
        this->store_moments(strip, rows);
      }
      ranks_(strip, &this->aux(0, strip.i0), diagnostics ? &this->aux(4, strip.i0) : nullptr,
             diagnostics ? &this->aux(5, strip.i0) : nullptr);
      this->find_moments(strip, rows);
      this->use_max_as_shift(rows);
      for_each_part(strip, [&](const Tile<T>& part) {
        ExpSums<T> sums{};
        sums.beta = 1;
        sums.row_shift = rows.shift, sums.row_sum = rows.part;
        sums.row_square_sum = diagnostics ? rows.part_square : nullptr;
        tile_kernels<T>().exp_sums(part, sums);
        for (int64_t r = 0; r < strip.rows; ++r) {
          rows.sum[r] += rows.part[r];
          if (diagnostics) rows.square[r] += rows.part_square[r];
        }
      });
      this->store_sums(strip, rows);
    });
  }

 private:
  ExactRanks<T> ranks_;
};

// The gradient's weights from exact ranks: those of a plain log-sum-exp once log omega is in the logits.
template <class T>
class ExactGradient {
 public:
  ExactGradient(const Problem<T>& problem, const RankRule& rule, const AnchorWeights<T>& rows)
      : ranks_(problem, rule), rows_(rows) {}

  void operator()(const Tile<T>& tile) {
    for_each_strip_of_rows(tile, [&](const Tile<T>& strip) {
      ranks_(strip);
      Weights<T> weights{};
      weights.num_exponents = 1, weights.beta[0] = 1;
      weights.row_coef[0] = rows_.coef(0) + strip.i0, weights.row_shift[0] = rows_.shift(0) + strip.i0;
      for_each_part(strip, [&](const Tile<T>& part) { tile_kernels<T>().weights(part, weights); });
    });
  }

 private:
  ExactRanks<T> ranks_;
  const AnchorWeights<T>& rows_;
};

}  // namespace

template <class T>
void exact_ranks_forward(const Problem<T>& problem, const RankRule& rule, const RankedResults<T>& results) {
  TileGrid grid{};
  if (!begin_blocks(problem, rule, grid, results)) return;
  sweep_tiles(grid, [&] { return ExactForward<T>(problem, rule, grid, results); });
}

template <class T>
void exact_ranks_backward(const Problem<T>& problem, const RankRule& rule, const RankedInputs<T>& in, T* du, T* dv) {
  TileGrid grid{};
  if (!begin_gradient(problem, grid, du, dv)) return;
  choose_row_blocks(grid);
  grid.triangle = false;  // a pair's ranks in its two rows have nothing in common
  AnchorWeights<T> rows(problem, in.lse, in.grad_lse, problem.n);
  rows.fill(/*shared=*/false);
  sweep_tiles(grid, [&] {
    return GradientWorker<T, ExactGradient<T>>(problem, grid, ExactGradient<T>(problem, rule, rows), du, dv);
  });
}

template void exact_ranks_forward<float>(const Problem<float>&, const RankRule&, const RankedResults<float>&);
template void exact_ranks_forward<double>(const Problem<double>&, const RankRule&, const RankedResults<double>&);
template void exact_ranks_backward<float>(const Problem<float>&, const RankRule&, const RankedInputs<float>&, float*,
                                          float*);
template void exact_ranks_backward<double>(const Problem<double>&, const RankRule&, const RankedInputs<double>&,
                                           double*, double*);

}  // namespace contrastive_ext
