// Gradients of any loss of the row statistics: its coefficients dL/dlse in, du and dv out, the tiles computed again.
#pragma once

#include "row_stats.h"

namespace contrastive_ext {

// K = exponents.size(). Column statistics are null where only rows were anchors; for one set the columns' are the
// rows'.
template <class T>
struct BackwardInputs {
  const T *lse, *grad_lse;          // [K, n]
  const T *col_lse, *grad_col_lse;  // [K, m]
};

// du [n, d], dv [m, d]; null: not needed. One set: du alone, both roles summed.
template <class T>
void row_stats_backward(const Problem<T>& problem, const BackwardInputs<T>& in, T* du, T* dv);

extern template void row_stats_backward<float>(const Problem<float>&, const BackwardInputs<float>&, float*, float*);
extern template void row_stats_backward<double>(const Problem<double>&, const BackwardInputs<double>&, double*,
                                                double*);

}  // namespace contrastive_ext
