// Scores of columns by several scorers per image, the best of them kept: a guide's similarities, or those that detect
// false negatives.
#pragma once

#include "scores.h"
#include "tile.h"

namespace contrastive_ext {

// score_ij = max_s <scorers[s, i % groups], columns[j]>; NaN where one of them is
template <class T>
struct Scorers {
  const T* scorers;            // [count, groups, dim]
  int64_t count, groups, dim;  // count 0: none
  Panels<T> columns;           // [m, dim]
};

// best [i1 - i0, ld] receives the scores of rows [i0, i1) and columns [j0, j1); spare is as large, needed if count > 1.
template <class T>
inline void best_score_tile(const Scorers<T>& by, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* best, T* spare,
                            int64_t ld) {
  for (int64_t s = 0; s < by.count; ++s) {
    T* out = s == 0 ? best : spare;
    for (int64_t i = i0, rows; i < i1; i += rows) {  // one product unless the block wraps around the groups
      const int64_t g = i % by.groups;
      rows = by.groups - g < i1 - i ? by.groups - g : i1 - i;
      score_tile(out + (i - i0) * ld, ld, 1.0, by.scorers + (s * by.groups + g) * by.dim, rows, by.columns, j0, j1 - j0,
                 by.dim);
    }
    if (s > 0) tile_kernels<T>().larger_of(best, spare, (i1 - i0) * ld);
  }
}

}  // namespace contrastive_ext
