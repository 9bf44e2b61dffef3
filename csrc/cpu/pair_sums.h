// Sums over pairs: for every row the sum of softplus(sign s_ij + offset_i) over its selected columns, and the gradient.
//
// No running maximum and nothing of the columns: a tile adds to its rows, in order. Two sets; rows against themselves
// are given twice.
#pragma once

#include "row_stats.h"

namespace contrastive_ext {

template <class T>
struct PairSums {
  T sign;           // 1 or -1
  const T* offset;  // [n]
};

// Each [n]: the sums, their derivatives by the offset (sums of sigmoids), how many columns were selected.
template <class T>
struct PairSumResults {
  T *sum, *slope, *count;
};

template <class T>
void pair_sums_forward(const Problem<T>& problem, const PairSums<T>& terms, const PairSumResults<T>& results);

// du [n, d], dv [m, d]; null: not needed.
template <class T>
void pair_sums_backward(const Problem<T>& problem, const PairSums<T>& terms, const T* grad_sum, T* du, T* dv);

}  // namespace contrastive_ext
