// Every anchor's number of negatives, without looking at pairs: O((N + M) log) for ids plus the pairs of one image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pairs.h"

namespace contrastive_ext {

// How many of `count` ids equal a given one.
class IdCounts {
 public:
  IdCounts(const int64_t* ids, int64_t count) : sorted_(ids, ids + (ids ? count : 0)) {
    std::sort(sorted_.begin(), sorted_.end());
  }
  int64_t of(int64_t id) const {
    const auto range = std::equal_range(sorted_.begin(), sorted_.end(), id);
    return range.second - range.first;
  }

 private:
  std::vector<int64_t> sorted_;
};

// row_count [n] receives |{j : keep(i -> j)}|, col_count [m] (null: not wanted) |{i : keep(j -> i)}|, as T.
template <class T>
inline void count_negatives(const PairRules& rules, int64_t n, int64_t m, T* row_count, T* col_count) {
  const IdCounts row_ids(rules.row_ids, n), col_ids(rules.col_ids, m);
  const bool compare = rules.row_ids && rules.col_ids;
  const int64_t unfilled_cols = col_ids.of(kUnfilled), unfilled_rows = row_ids.of(kUnfilled);
  const int64_t images = rules.num_images;

  // A pair of one image that its ids already cancel must not be taken off twice.
  for (int64_t i = 0; i < n; ++i) {
    int64_t kept = m - unfilled_cols;
    if (compare && rules.row_ids[i] != kUnfilled) kept -= col_ids.of(rules.row_ids[i]);
    if (images > 0 && !rules.has_ids())
      kept -= (n - 1 - i % images) / images + 1;
    else if (images > 0)
      for (int64_t r = i % images; r < n; r += images)
        kept -= rules.id_class(i, r + rules.positive_offset) & kColumnIsNegative ? 1 : 0;
    row_count[i] = static_cast<T>(kept);
  }
  if (!col_count) return;
  for (int64_t j = 0; j < m; ++j) {
    int64_t kept = n - unfilled_rows;
    if (compare && rules.col_ids[j] != kUnfilled) kept -= row_ids.of(rules.col_ids[j]);
    const int64_t shown = j - rules.positive_offset;
    if (images > 0 && shown >= 0 && shown < n) {
      if (!rules.has_ids())
        kept -= (n - 1 - shown % images) / images + 1;
      else
        for (int64_t i = shown % images; i < n; i += images) kept -= rules.id_class(i, j) & kRowIsNegative ? 1 : 0;
    }
    col_count[j] = static_cast<T>(kept);
  }
}

}  // namespace contrastive_ext
