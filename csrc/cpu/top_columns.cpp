// A sweep whose rows keep sorted lists: the list's last score is the limit that the vectorised search for the next
// candidate compares with, and rises quickly, so that nearly every column costs one comparison.
//
// A list meets its columns in ascending order and only a larger score displaces another, so of equals the lower column
// stays. NaN is larger than nothing.
//
// Where the columns are the scorers' rows, a score serves both of its vectors and the sweep is a triangle. Every vector
// then keeps a list, and those of an image's views are merged: a column among the best of the image is among the best
// of the view that scores it highest.
#include "top_columns.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pair_tables.h"
#include "row_stats.h"

namespace contrastive_ext {
namespace {

// Sorted lists of `k` columns, best first.
template <class T>
struct BestLists {
  T* scores;         // [lists, k]
  int64_t* columns;  // [lists, k]
  int64_t k;

  // -inf while the list is not full
  T limit(int64_t list) const { return scores[(list + 1) * k - 1]; }

  void clear(int64_t lists) const {
    std::fill(scores, scores + lists * k, static_cast<T>(-INFINITY));
    std::fill(columns, columns + lists * k, kNoColumn);
  }

  // Behind everything at least as large; the last one drops out.
  void insert(int64_t list, T score, int64_t column) const {
    T* own_scores = scores + list * k;
    int64_t* own_columns = columns + list * k;
    int64_t at = 0;
    for (int64_t c = 0; c + 1 < k; ++c) at += own_scores[c] >= score;
    std::copy_backward(own_scores + at, own_scores + k - 1, own_scores + k);
    std::copy_backward(own_columns + at, own_columns + k - 1, own_columns + k);
    own_scores[at] = score, own_columns[at] = column;
  }
};

// Puts -inf, which is in nobody's list, in place of the scores of image `image` with the columns that show it.
template <class T>
void hide_own_image(const TopColumns<T>& p, int64_t image, T* x, int64_t j0, int64_t cols) {
  const int64_t images = p.num_images;
  if (images == 0) return;
  const int64_t after = (j0 - image) % images;  // columns since one that shows it; the image may lie right of j0
  for (int64_t j = after > 0 ? images - after : -after; j < cols; j += images) x[j] = static_cast<T>(-INFINITY);
}

// Whether image g may take column j, which does not show it, into its list.
template <class T>
bool is_candidate(const TopColumns<T>& p, int64_t g, int64_t j, T score) {
  if (p.col_ids && (p.col_ids[j] == kUnfilled || (p.row_ids && p.col_ids[j] == p.row_ids[g]))) return false;
  return !(p.excluded && p.excluded[g] == j) && !(p.below && !(score < p.below[g]));
}

// Calls take(j) for the columns j in [begin, cols) of a row of scores that limit(), which take may raise, or limits may
// let through; limits may be null. A column may come that is above neither any more.
template <class T, class Limit, class Take>
void for_each_above(const T* x, int64_t begin, int64_t cols, const T* limits, const Limit& limit, const Take& take) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  int64_t block = 0;
  for (; uint64_t found = kernels.above(x, begin, cols, limit(), limits, &block); begin = block + kLaneBlock)
    for (; found; found &= found - 1) take(block + __builtin_ctzll(found));
}

// Two sets: a list of every image.
template <class T>
class TwoSetsWorker {
 public:
  TwoSetsWorker(const TopColumns<T>& problem, const BestLists<T>& lists, const TileGrid& grid)
      : problem_(problem),
        lists_(lists),
        ld_(grid.tile_cols),
        size_(grid.block_rows * ld_),
        scores_((problem.by.count > 1 ? 2 : 1) * size_) {}

  void begin(int64_t, int64_t) {}

  void compute(const TileRange& range) {
    T* scores = scores_.get();
    best_score_tile(problem_.by, range.i0, range.i1, range.j0, range.j1, scores, scores + size_, ld_);
    for (int64_t g = range.i0; g < range.i1; ++g)
      take_from(scores + (g - range.i0) * ld_, g, range.j0, range.j1 - range.j0);
  }

  void add_columns(const TileRange&) {}
  void end(int64_t, int64_t) {}

 private:
  void take_from(T* x, int64_t g, int64_t j0, int64_t cols) {
    hide_own_image(problem_, g, x, j0, cols);
    for_each_above(
        x, 0, cols, static_cast<const T*>(nullptr), [&] { return lists_.limit(g); },
        [&](int64_t j) {
          const int64_t column = j0 + j;
          if (x[j] > lists_.limit(g) && is_candidate(problem_, g, column, x[j])) lists_.insert(g, x[j], column);
        });
  }

  const TopColumns<T>& problem_;
  const BestLists<T>& lists_;
  int64_t ld_, size_;
  Workspace<T> scores_;
};

// One set: a list of every vector. They change in turns alone, those of a block's rows too: its first tile holds them
// as columns, so that earlier blocks are done with them from that turn on, and later blocks begin right of them.
template <class T>
class OneSetWorker {
 public:
  OneSetWorker(const TopColumns<T>& problem, const BestLists<T>& lists, const TileGrid& grid)
      : problem_(problem),
        lists_(lists),
        ld_(padded_to(kColumnPad, grid.tile_cols) + kVectorPad),
        has_rules_(problem.col_ids || problem.excluded || problem.below),
        scores_(grid.block_rows * ld_),
        limits_(ld_) {}

  void begin(int64_t, int64_t) {}

  void compute(const TileRange& range) {
    const Scorers<T>& by = problem_.by;
    score_tile(scores_.get(), ld_, 1.0, by.scorers + range.i0 * by.dim, range.i1 - range.i0, by.columns, range.j0,
               range.j1 - range.j0, by.dim, range.upper, range.j0 - range.i0);
  }

  void add_columns(const TileRange& range) {
    for (int64_t j = range.j0; j < range.j1; ++j) {
      limits_.get()[j - range.j0] = lists_.limit(j);
      __builtin_prefetch(lists_.columns + j * lists_.k, /*to write*/ 1);
    }
    for (int64_t i = range.i0; i < range.i1; ++i) take_from(scores_.get() + (i - range.i0) * ld_, i, range);
  }

  void end(int64_t, int64_t) {}

 private:
  void take_from(T* x, int64_t i, const TileRange& range) {
    const int64_t groups = problem_.by.groups, cols = range.j1 - range.j0, diagonal = i - range.j0;
    hide_own_image(problem_, i % groups, x, range.j0, cols);
    T* limits = limits_.get();
    const auto limit = [&] { return lists_.limit(i); };
    for_each_above(x, std::max<int64_t>(diagonal, 0), cols, limits, limit, [&](int64_t j) {
      const int64_t column = range.j0 + j;
      if (x[j] > limit() && (!has_rules_ || is_candidate(problem_, i % groups, column, x[j])))
        lists_.insert(i, x[j], column);
      if (!(x[j] > limits[j]) || j == diagonal) return;
      if (has_rules_ && !is_candidate(problem_, column % groups, i, x[j])) return;
      lists_.insert(column, x[j], i);
      limits[j] = lists_.limit(column);
    });
  }

  const TopColumns<T>& problem_;
  const BestLists<T>& lists_;
  int64_t ld_;
  bool has_rules_;
  Workspace<T> scores_, limits_;
};

// The best of the lists of every image's views; of a column in several of them its largest score.
template <class T>
void merge_views(const TopColumns<T>& p, const BestLists<T>& views, const BestLists<T>& best) {
  std::vector<int64_t> taken_by(static_cast<size_t>(p.m), kNoColumn), next(static_cast<size_t>(p.by.count));
  for (int64_t g = 0; g < p.by.groups; ++g) {
    std::fill(next.begin(), next.end(), 0);
    for (int64_t at = 0; at < p.k;) {
      int64_t first = -1, from = 0;
      for (int64_t s = 0; s < p.by.count; ++s) {
        const int64_t here = (s * p.by.groups + g) * p.k + next[s];
        if (next[s] == p.k || views.columns[here] == kNoColumn) continue;
        if (first < 0 || views.scores[here] > views.scores[first] ||
            (views.scores[here] == views.scores[first] && views.columns[here] < views.columns[first]))
          first = here, from = s;
      }
      if (first < 0) break;
      ++next[from];
      int64_t& taken = taken_by[views.columns[first]];
      if (taken == g) continue;
      taken = g;
      best.scores[g * p.k + at] = views.scores[first], best.columns[g * p.k + at] = views.columns[first];
      ++at;
    }
  }
}

// Whether the triangle makes the lists of images. Not where lists of views would have to know of each other: a score
// that is NaN to one view of an image, or not `below` its limit, keeps the column from the lists of all. Nor where it
// would be slower: long lists of a tile's columns do not stay in the cache, and there is one for each view
// (docs/measurements.md).
template <class T>
bool takes_triangle(const TopColumns<T>& p) {
  constexpr int64_t kLongest = 64, kProductsWorthAPlace = 10000;
  if (!p.one_set || p.k > kLongest || p.m * p.by.dim < p.k * kProductsWorthAPlace) return false;
  if (p.by.count == 1) return true;
  if (p.below) return false;
  const T bound = std::sqrt(std::numeric_limits<T>::max() / static_cast<T>(p.by.dim)) / 2;  // sums stay finite
  bool inside = true;
  for (int64_t c = 0; c < p.m * p.by.dim; ++c) inside &= std::abs(p.by.scorers[c]) <= bound;
  return inside;
}

template <class T>
void sweep_one_set(const TopColumns<T>& problem, const BestLists<T>& lists) {
  TileGrid grid{};
  grid.rows = grid.cols = problem.m, grid.depth = problem.by.dim;
  choose_tile_sizes(grid);
  grid.triangle = grid.column_results = true;
  sweep_tiles(grid, [&] { return OneSetWorker<T>(problem, lists, grid); });
}

}  // namespace

template <class T>
void top_columns(const TopColumns<T>& problem) {
  const BestLists<T> best{problem.scores, problem.columns, problem.k};
  best.clear(problem.by.groups);
  if (takes_triangle(problem)) {
    if (problem.by.count == 1) return sweep_one_set(problem, best);
    const Workspace<T> scores(problem.m * problem.k);
    const Workspace<int64_t> columns(problem.m * problem.k);
    const BestLists<T> views{scores.get(), columns.get(), problem.k};
    views.clear(problem.m);
    sweep_one_set(problem, views);
    return merge_views(problem, views, best);
  }
  TileGrid grid{};
  grid.rows = problem.by.groups, grid.cols = problem.m, grid.depth = problem.by.count * problem.by.dim;
  choose_tile_sizes(grid);
  sweep_tiles(grid, [&] { return TwoSetsWorker<T>(problem, best, grid); });
}

template void top_columns<float>(const TopColumns<float>&);
template void top_columns<double>(const TopColumns<double>&);

}  // namespace contrastive_ext
