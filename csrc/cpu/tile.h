// A tile of the score matrix and what the instruction-set-specific kernels do to it. Plain data: this header is seen by
// code compiled for different instruction sets, so it holds no function bodies.
#pragma once

#include <cstdint>

#include "../pairs.h"

namespace contrastive_ext {

constexpr int64_t kMaxTileCols = 1024;
// Kernels read and write whole vectors: every per-column array is padded to kColumnPad elements, a tile's rows to whole
// vectors, its number of rows and every per-row array to kRowStep.
constexpr int64_t kColumnPad = 64;
constexpr int64_t kLaneBlock = 64;  // columns that are looked at together, a bit for each
constexpr int64_t kVectorPad = 16;  // elements of the longest vector
constexpr int64_t kRowStep = 4;

template <class T>
struct Tile {
  T* s;        // logits, row-major; padding holds anything, NaN included
  int64_t ld;  // row length in elements, a multiple of kVectorPad
  int64_t i0, rows, j0, cols;
  const PairRules* pairs;
  bool special;  // whether any pair in it may be ignored; otherwise no pair is tested
  bool upper;    // it meets the diagonal of one set: only pairs j >= i count, j == i only in the row direction
  const T* gate = nullptr;       // a second similarity, in s's layout; a pair is ignored where it exceeds
  const T* row_limit = nullptr;  // the row's limit as an anchor,
  const T* col_limit = nullptr;  // the column's; null where columns are no anchors
  T* row_count = nullptr;        // null, or receive how many negatives every row has in the tile,
  T* col_count = nullptr;        // and every column
};

// Maximum and sum of the kept logits, per row and (when col_max is set) per column as anchor.
template <class T>
struct Moments {
  T *row_max, *row_sum;
  T *col_max, *col_sum;
};

// Sums of e = exp(beta s - shift) over the kept pairs, and of e^2 where wanted.
template <class T>
struct ExpSums {
  T beta;
  T factor, factor_low,
      shift2;  // row_shift null: e = 2^((factor + factor_low) s - shift2), for both directions; shift2 an integer
  const T* row_shift;  // otherwise a shift per row and one per column
  const T* col_shift;
  T* row_sum;
  T* row_square_sum;  // null: not wanted
  T* col_sum;         // null: rows only
  T* col_square_sum;
  T* e;  // null, or a tile of s's layout that receives the row-direction exponentials
  T* e_square;
};

// Gradient weights, in place of the logits:
//   W_ij = sum_k keep(i->j) row_coef_k,i exp(beta_k s - row_shift_k,i) + keep(j->i) col_coef_k,j exp(beta_k s -
//   col_shift_k,j)
template <class T>
struct Weights {
  int num_exponents;  // 1 or 2
  bool shared;        // no shifts: 2^(factor_k s) is in range and serves both directions
  bool square;        // with `shared`: factor_1 = 2 factor_0
  T beta[2], factor[2], factor_low[2];
  const T *row_coef[2], *row_shift[2];  // indexed by row of the tile
  const T *col_coef[2], *col_shift[2];  // indexed by column of the tile; col_coef[0] null: rows only
};

// The weight of a negative by its rank, see ranking.h.
template <class T>
struct RankShape {
  T b, c, eps, low, high;
};

// Histograms of the logits of consecutive anchors: `bins` equal bins from `low` on, `per_logit` bins per unit of logit.
template <class T>
struct Histograms {
  int64_t bins;
  const T* below;  // [anchors, bins + 1] negatives in lower bins
  const T *low, *per_logit, *count, *inverse_count;
};

// Smallest and largest of the kept logits per row.
template <class T>
struct Extremes {
  T *row_min, *row_max;
};

// Adds the kept logits to counts [rows, bins, 2]; a bin holds the sum of its two counters.
template <class T>
struct BinCounts {
  int64_t bins;
  const T *low, *per_logit;
  int32_t* counts;
};

// The step of every kept logit among `steps` equal ones of its row's range, and `steps` where a pair is ignored:
// integers in the order of the logits, keys [rows, columns]. A NaN goes to step 0.
template <class T>
struct RankKeys {
  int32_t steps;
  const T *low, *per_logit;
  int32_t* keys;
  int64_t columns;  // whole vectors
};

// Sums of e = omega exp(s - row_shift), of e^2 and of omega over the kept pairs, the largest omega, and the largest
// log(omega e^s), less than log 2 too low (null: not wanted).
template <class T>
struct RankedSums {
  RankShape<T> shape;
  Histograms<T> rows;
  const T* row_shift;
  T *row_sum, *row_square_sum, *weight_sum, *weight_max, *term_max;
};

// Gradient weights, in place of the logits: Weights with one exponent, each direction times the omega of its anchor.
template <class T>
struct RankedWeights {
  RankShape<T> shape;
  Histograms<T> rows, cols;
  bool shared;  // as in Weights
  T factor, factor_low;
  const T *row_coef, *row_shift;
  const T *col_coef, *col_shift;  // col_coef null: rows only
};

// Sums of softplus(x) and of sigmoid(x) over the kept pairs, x = sign s + offset of the row.
template <class T>
struct SoftplusSums {
  T sign;
  const T* offset;
  T *row_sum, *row_slope;
};

// Gradient weights of such sums, in place of the logits: W_ij = keep(i->j) coef_i sigmoid(sign s + offset_i).
template <class T>
struct SigmoidWeights {
  T sign;
  const T *offset, *coef;
};

// c = scale a b, or c += a b with scale 1, for a [rows, depth] of any strides and b [depth, cols].
template <class T>
struct Product {
  T* c;
  int64_t c_row;  // from one row to the next
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth;
  int64_t rows, cols, depth;
  T scale;
  bool accumulate;
};

template <class T>
struct TileKernels {
  void (*product)(const Product<T>&);
  // y[d, rows] = x[rows, d]^T, of strides y_row and x_row.
  void (*transpose)(T* y, int64_t y_row, const T* x, int64_t x_row, int64_t rows, int64_t d);
  void (*moments)(const Tile<T>&, const Moments<T>&);
  void (*exp_sums)(const Tile<T>&, const ExpSums<T>&);
  void (*weights)(const Tile<T>&, const Weights<T>&);
  // x[i] = the larger of x[i] and y[i], NaN if one of them is; n a multiple of kVectorPad.
  void (*larger_of)(T* x, const T* y, int64_t n);
  // From begin on the first kLaneBlock columns, a whole block of them, where an x[j] > limit or, unless limits is null,
  // x[j] > limits[j] for j in [begin, end): a bit for each such column, the block's first column in `block`. 0: none.
  // x and limits are readable up to a multiple of kLaneBlock.
  uint64_t (*above)(const T* x, int64_t begin, int64_t end, T limit, const T* limits, int64_t* block);
  void (*extremes)(const Tile<T>&, const Extremes<T>&);
  void (*bin_counts)(const Tile<T>&, const BinCounts<T>&);
  void (*rank_keys)(const Tile<T>&, const RankKeys<T>&);
  void (*ranked_sums)(const Tile<T>&, const RankedSums<T>&);
  void (*ranked_weights)(const Tile<T>&, const RankedWeights<T>&);
  void (*softplus_sums)(const Tile<T>&, const SoftplusSums<T>&);
  void (*sigmoid_weights)(const Tile<T>&, const SigmoidWeights<T>&);
  // For the tests: the class of every pair [rows, cols], all negatives in a strip that takes the plain loop,
  // y = exp(x), and y = 2^(factor x - shift2) for arguments in range.
  void (*classes)(const Tile<T>&, uint8_t* pair_class);
  void (*exp)(const T* x, T* y, int64_t n);
  void (*exp2_in_range)(const T* x, T* y, int64_t n, T factor, T factor_low, T shift2);
};

struct Isa {
  const char* name;
  bool usable;  // on this CPU
  const TileKernels<float>* f32;
  const TileKernels<double>* f64;
};

// Compiled paths, best first; the last one is always usable. Chosen once, on first use.
const Isa* compiled_isas(int* count);
const Isa& chosen_isa();

template <class T>
const TileKernels<T>& tile_kernels();
template <>
inline const TileKernels<float>& tile_kernels<float>() {
  return *chosen_isa().f32;
}
template <>
inline const TileKernels<double>& tile_kernels<double>() {
  return *chosen_isa().f64;
}

}  // namespace contrastive_ext
