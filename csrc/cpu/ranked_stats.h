// Row statistics whose negatives are weighted by their rank in the row, and the gradient of the log-sum-exp.
//
// Ranks span a row, so a forward tile spans all columns: a block of rows is scored into a resident buffer, ranked row
// by row and summed. Exact ranks come from sorting a row; once log omega is added to its logits the kernels of the
// plain statistics do the rest, forward and backward. Histogram ranks are interpolated in a table of every anchor that
// the forward leaves behind: the backward is back on the core's tiles, in triangle form for one set.
#pragma once

#include "row_stats.h"

namespace contrastive_ext {

// How negatives are weighted; bins = 0: exact ranks.
struct RankRule {
  double b, c, eps, low, high;
  int64_t bins;

  template <class T>
  RankShape<T> shape() const {
    return {static_cast<T>(b), static_cast<T>(c), static_cast<T>(eps), static_cast<T>(low), static_cast<T>(high)};
  }
};

// axis and below: null for exact ranks.
template <class T>
struct RankedResults {
  T* lse;    // [n]
  T* aux;    // [1, n] count, or with diagnostics [6, n]: contrastive_ext/problem/ranking.py lists them
  T* axis;   // [3, n] lowest logit, bins per unit of logit, count
  T* below;  // [n, bins + 1] negatives in lower bins
  bool diagnostics;
};

template <class T>
struct RankedInputs {
  const T *lse, *axis, *below, *grad_lse;
};

template <class T>
void exact_ranks_forward(const Problem<T>& problem, const RankRule& rule, const RankedResults<T>& results);
template <class T>
void histogram_ranks_forward(const Problem<T>& problem, const RankRule& rule, const RankedResults<T>& results);

// du [n, d], dv [m, d]; null: not needed. One set: du alone, both roles summed.
template <class T>
void exact_ranks_backward(const Problem<T>& problem, const RankRule& rule, const RankedInputs<T>& in, T* du, T* dv);
template <class T>
void histogram_ranks_backward(const Problem<T>& problem, const RankRule& rule, const RankedInputs<T>& in, T* du, T* dv);

}  // namespace contrastive_ext
