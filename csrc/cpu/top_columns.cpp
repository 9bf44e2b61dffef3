// A sweep whose rows keep sorted lists: the list's last score is the limit that the vectorised search for the next
// candidate compares with, and rises quickly, so that nearly every column costs one comparison.
//
// A row's columns come in ascending order and only a larger score displaces another, so of equals the lower column
// stays. NaN is larger than nothing.
#include "top_columns.h"

#include <algorithm>
#include <cmath>

#include "pair_tables.h"
#include "row_stats.h"

namespace contrastive_ext {
namespace {

template <class T>
class TopColumnsWorker {
 public:
  TopColumnsWorker(const TopColumns<T>& problem, const TileGrid& grid)
      : problem_(problem),
        ld_(grid.tile_cols),
        size_(grid.block_rows * ld_),
        scores_((problem.by.count > 1 ? 2 : 1) * size_) {}

  void begin(int64_t g0, int64_t g1) {
    std::fill(problem_.scores + g0 * problem_.k, problem_.scores + g1 * problem_.k, static_cast<T>(-INFINITY));
    std::fill(problem_.columns + g0 * problem_.k, problem_.columns + g1 * problem_.k, kNoColumn);
  }

  void compute(const TileRange& range) {
    T* scores = scores_.get();
    best_score_tile(problem_.by, range.i0, range.i1, range.j0, range.j1, scores, scores + size_, ld_);
    for (int64_t g = range.i0; g < range.i1; ++g)
      take_from(scores + (g - range.i0) * ld_, g, range.j0, range.j1 - range.j0);
  }

  void add_columns(const TileRange&) {}
  void end(int64_t, int64_t) {}

 private:
  void take_from(const T* x, int64_t g, int64_t j0, int64_t cols) {
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T& limit = problem_.scores[(g + 1) * problem_.k - 1];
    for (int64_t j = -1; (j = kernels.first_above(x, j + 1, cols, limit)) < cols;)
      if (is_candidate(g, j0 + j, x[j])) insert(g, x[j], j0 + j);
  }

  bool is_candidate(int64_t g, int64_t j, T score) const {
    const TopColumns<T>& p = problem_;
    if (p.num_images > 0 && j % p.num_images == g) return false;
    if (p.col_ids && (p.col_ids[j] == kUnfilled || (p.row_ids && p.col_ids[j] == p.row_ids[g]))) return false;
    return !(p.excluded && p.excluded[g] == j) && !(p.below && !(score < p.below[g]));
  }

  // Behind everything at least as large; the last one drops out.
  void insert(int64_t g, T score, int64_t column) {
    T* scores = problem_.scores + g * problem_.k;
    int64_t* columns = problem_.columns + g * problem_.k;
    int64_t at = problem_.k - 1;
    for (; at > 0 && scores[at - 1] < score; --at) scores[at] = scores[at - 1], columns[at] = columns[at - 1];
    scores[at] = score, columns[at] = column;
  }

  const TopColumns<T>& problem_;
  int64_t ld_, size_;
  Workspace<T> scores_;
};

}  // namespace

template <class T>
void top_columns(const TopColumns<T>& problem) {
  TileGrid grid{};
  grid.rows = problem.by.groups, grid.cols = problem.m, grid.depth = problem.by.count * problem.by.dim;
  choose_tile_sizes(grid);
  sweep_tiles(grid, [&] { return TopColumnsWorker<T>(problem, grid); });
}

template void top_columns<float>(const TopColumns<float>&);
template void top_columns<double>(const TopColumns<double>&);

}  // namespace contrastive_ext
