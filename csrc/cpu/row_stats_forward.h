// lse, counts, diagnostics and softmax-weighted means of every row (and column) over its negatives, in one sweep.
#pragma once

#include "row_stats.h"

namespace contrastive_ext {

// Null pointers are results that nobody asked for. K = exponents.size().
template <class T>
struct ForwardResults {
  T* lse;      // [K, n]
  T* aux;      // [1, n] count; with maximum [2, n] count, max s; with diagnostics [4, n] count, max s, sum of s, lse at
               // twice the first exponent
  T* col_lse;  // [K, m], every column as anchor
  T* col_aux;
  T* mean;  // [K, n, d]
  bool diagnostics, maximum;

  bool moments() const { return diagnostics || maximum; }
};

template <class T>
void row_stats_forward(const Problem<T>& problem, const ForwardResults<T>& results);

extern template void row_stats_forward<float>(const Problem<float>&, const ForwardResults<float>&);
extern template void row_stats_forward<double>(const Problem<double>&, const ForwardResults<double>&);

}  // namespace contrastive_ext
