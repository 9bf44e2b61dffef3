// The k best columns of every image by the largest of several scorers, best first, without the matrix.
#pragma once

#include "../pairs.h"
#include "scorers.h"

namespace contrastive_ext {

template <class T>
struct TopColumns {
  Scorers<T> by;
  bool one_set;  // the columns are the scorers' rows: column s groups + g is scorers[s, g]
  int64_t m, k;
  int64_t num_images;  // 0, or groups: column j is no candidate of image j % num_images
  // Each null or: columns whose id is kUnfilled are nobody's candidates; with row_ids those of an image's own id are
  // none of it; one column of each image is none; a candidate's score is smaller than `below`.
  const int64_t *col_ids, *row_ids, *excluded;
  const T* below;
  T* scores;         // [groups, k], -inf where an image has fewer candidates
  int64_t* columns;  // [groups, k], kNoColumn there
};

constexpr int64_t kNoColumn = -1;

template <class T>
void top_columns(const TopColumns<T>& problem);

extern template void top_columns<float>(const TopColumns<float>&);
extern template void top_columns<double>(const TopColumns<double>&);

}  // namespace contrastive_ext
