// The passes over a tile of logits that know the histograms of its anchors; compiled per instruction set like the
// others.
//
// Looking up the edges of a bin is a gather, which plain loads do as fast as vector units: a strip finds the bins of a
// row with vectors, loads their edges one by one, and turns to vectors again for weights and exponentials.
#pragma once

#include "strips.h"

namespace contrastive_ext {
namespace CE_ISA {

// Bin of every logit and its place in it, from 0 to 1; a NaN goes to bin 0.
template <class T>
inline void find_bin(typename Simd<T>::V s, typename Simd<T>::V low, typename Simd<T>::V per_logit, T bins,
                     typename Simd<T>::I* bin, typename Simd<T>::V* place) {
  using V = typename Simd<T>::V;
  V position = (s - low) * per_logit;
  position = position > 0 ? position : V{};
  position = position < bins ? position : broadcast<T>(bins);
  const V inside = position < bins - 1 ? position : broadcast<T>(bins - 1);
  *bin = __builtin_convertvector(inside, typename Simd<T>::I);
  *place = position - __builtin_convertvector(*bin, V);
}

// omega of negatives at `place` in a bin with `start` negatives below it and `end` up to its upper edge.
template <class T>
inline typename Simd<T>::V rank_weight(const RankShape<T>& shape, typename Simd<T>::V place, typename Simd<T>::V start,
                                       typename Simd<T>::V end, typename Simd<T>::V count,
                                       typename Simd<T>::V inverse_count) {
  using V = typename Simd<T>::V;
  V rank = start + place * (end - start - T(1)) + T(1);
  rank = rank > 0 ? rank : V{};  // a logit that rounds otherwise than the forward's may meet an empty bin
  rank = rank < count ? rank : count;
  const V u = rank * inverse_count, v = (count - rank) * inverse_count;
  const V above = v + shape.eps, from_middle = v + v - shape.c;
  const V root = square_root(from_middle * from_middle + 4 * u * above);
  // Phi/2 = u / (b + root) and (1 - Phi)/2 = above / (c + 2 eps + root), over their common denominator
  const V phi = u * (root + (shape.c + 2 * shape.eps)), rest = above * (root + shape.b);
  return (shape.low * rest + shape.high * phi) / (shape.b * rest + shape.c * phi);
}

// Smaller weights are 0: their inverses, and the exponentials that they balance, would not be numbers.
template <class T>
inline typename Simd<T>::V smallest_weight() {
  return broadcast<T>(sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022));
}

// log of a weight not below the smallest, rounded down to a multiple of log 2.
template <class T>
inline typename Simd<T>::V log_below(typename Simd<T>::V weight) {
  using I = typename Simd<T>::I;
  I bits;
  memcpy(&bits, &weight, sizeof(bits));
  bits = (bits >> Exp2Constants<T>::kMantissaBits) - (sizeof(T) == 4 ? 127 : 1023);
  return __builtin_convertvector(bits, typename Simd<T>::V) * T(0.69314718055994530942);
}

// The bins of one row of a tile, then the edges of those bins.
template <class T>
struct RowBins {
  alignas(64) typename Simd<T>::Lane bin[kMaxTileCols];
  alignas(64) T place[kMaxTileCols], edges[2 * kMaxTileCols];  // lower, upper, lower, upper, ...

  void find(const T* s, int64_t cols, T low, T per_logit, int64_t bins) {
    for (int64_t j = 0; j < cols; j += Simd<T>::kWidth)
      store_bins(j, load(s + j), broadcast<T>(low), broadcast<T>(per_logit), bins);
  }
  // Every column is its own anchor.
  void find(const T* s, int64_t cols, const T* low, const T* per_logit, int64_t bins) {
    for (int64_t j = 0; j < cols; j += Simd<T>::kWidth)
      store_bins(j, load(s + j), load(low + j), load(per_logit + j), bins);
  }
  // `stride` apart are the tables of the columns; 0: one table, the row's.
  void load_edges(const T* below, int64_t stride, int64_t cols) {
    for (int64_t j = 0; j < cols; ++j) memcpy(edges + 2 * j, below + j * stride + bin[j], 2 * sizeof(T));
  }
  typename Simd<T>::V weight(int64_t j, const RankShape<T>& shape, typename Simd<T>::V count,
                             typename Simd<T>::V inverse_count) const {
    typename Simd<T>::V start, end;
    split_pairs<T>(load(edges + 2 * j), load(edges + 2 * j + Simd<T>::kWidth), &start, &end);
    return rank_weight<T>(shape, load(place + j), start, end, count, inverse_count);
  }

 private:
  void store_bins(int64_t j, typename Simd<T>::V s, typename Simd<T>::V low, typename Simd<T>::V per_logit,
                  int64_t bins) {
    typename Simd<T>::I found;
    typename Simd<T>::V at;
    find_bin<T>(s, low, per_logit, static_cast<T>(bins), &found, &at);
    memcpy(bin + j, &found, sizeof(found));
    store(place + j, at);
  }
};

template <class T>
struct ExtremesStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const Extremes<T>& out) {
    using V = typename Simd<T>::V;
    const V infinite = broadcast<T>(__builtin_inff());
    for (int r = 0; r < kRowStep; ++r) {
      V low = infinite, high = -infinite;
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        const V s = load(tile.s + (row + r) * tile.ld + j);
        const uint8_t* pair = classes.pair[r] + j;
        low = -larger<T>(-(kMasked ? keep<T>(pair, kColumnIsNegative, s, infinite) : s), -low);
        high = larger<T>(kMasked ? keep<T>(pair, kColumnIsNegative, s, -infinite) : s, high);
      }
      out.row_min[row + r] = -horizontal_max<T>(-low);
      out.row_max[row + r] = horizontal_max<T>(high);
    }
  }
};

template <class T>
struct RankKeysStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const RankKeys<T>& out) {
    using V = typename Simd<T>::V;
    typedef int32_t Keys __attribute__((vector_size(Simd<T>::kWidth * sizeof(int32_t))));
    const V last = broadcast<T>(static_cast<T>(out.steps - 1)), ignored = broadcast<T>(static_cast<T>(out.steps));
    for (int r = 0; r < kRowStep; ++r) {
      const V low = broadcast<T>(out.low[row + r]), per_logit = broadcast<T>(out.per_logit[row + r]);
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        V step = (load(tile.s + (row + r) * tile.ld + j) - low) * per_logit;
        step = step > 0 ? step : V{};
        step = step < last ? step : last;
        if (kMasked) step = keep<T>(classes.pair[r] + j, kColumnIsNegative, step, ignored);
        const Keys keys = __builtin_convertvector(step, Keys);
        memcpy(out.keys + (row + r) * out.columns + j, &keys, sizeof(keys));
      }
    }
  }
};

template <class T>
struct BinCountsStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const BinCounts<T>& out) {
    RowBins<T> bins;
    for (int64_t r = 0; r < kRowStep && row + r < tile.rows; ++r) {
      bins.find(tile.s + (row + r) * tile.ld, tile.cols, out.low[row + r], out.per_logit[row + r], out.bins);
      // two counters a bin: neighbours often share one, and an increment waits for the last of the same counter
      int32_t* counts = out.counts + (row + r) * 2 * out.bins;
      const uint8_t* pair = classes.pair[r];
      for (int64_t j = 0; j < tile.cols; ++j)
        counts[2 * bins.bin[j] + (j & 1)] += kMasked ? pair[j] & kColumnIsNegative : 1;
    }
  }
};

template <class T>
struct RankedSumsStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const RankedSums<T>& out) {
    using V = typename Simd<T>::V;
    RowBins<T> bins;
    for (int64_t r = 0; r < kRowStep && row + r < tile.rows; ++r) {
      const int64_t i = row + r;
      const T* s = tile.s + i * tile.ld;
      bins.find(s, tile.cols, out.rows.low[i], out.rows.per_logit[i], out.rows.bins);
      bins.load_edges(out.rows.below + i * (out.rows.bins + 1), 0, tile.cols);
      const V shift = broadcast<T>(out.row_shift[i]), count = broadcast<T>(out.rows.count[i]);
      const V inverse_count = broadcast<T>(out.rows.inverse_count[i]), infinite = broadcast<T>(__builtin_inff());
      V sum{}, square{}, weights{}, largest{}, top = -infinite;
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        const V x = load(s + j);
        V weight = bins.weight(j, out.shape, count, inverse_count);
        // what weighs nothing may lie so far above the shift that its exponential is infinite; NaN stays NaN
        V e = weight >= smallest_weight<T>() ? weight * exp_shifted<T>(x, T(1), shift) : x - x;
        if (kMasked) {
          weight = keep<T>(classes.pair[r] + j, kColumnIsNegative, weight, V{});
          e = keep<T>(classes.pair[r] + j, kColumnIsNegative, e, V{});
        }
        if (out.term_max) top = larger<T>(weight >= smallest_weight<T>() ? x + log_below<T>(weight) : -infinite, top);
        sum += e;
        square += e * e;
        weights += weight;
        largest = larger<T>(weight, largest);
      }
      out.row_sum[i] = horizontal_sum<T>(sum), out.row_square_sum[i] = horizontal_sum<T>(square);
      out.weight_sum[i] = horizontal_sum<T>(weights), out.weight_max[i] = horizontal_max<T>(largest);
      if (out.term_max) out.term_max[i] = horizontal_max<T>(top);
    }
  }
};

template <class T, bool kColumns, bool kShared>
struct RankedWeightsStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const RankedWeights<T>& in) {
    using V = typename Simd<T>::V;
    RowBins<T> by_row, by_col;
    for (int64_t r = 0; r < kRowStep && row + r < tile.rows; ++r) {
      const int64_t i = row + r;
      T* s = tile.s + i * tile.ld;
      by_row.find(s, tile.cols, in.rows.low[i], in.rows.per_logit[i], in.rows.bins);
      by_row.load_edges(in.rows.below + i * (in.rows.bins + 1), 0, tile.cols);
      if (kColumns) {
        by_col.find(s, tile.cols, in.cols.low, in.cols.per_logit, in.cols.bins);
        by_col.load_edges(in.cols.below, in.cols.bins + 1, tile.cols);
      }
      const V row_coef = broadcast<T>(in.row_coef[i]), row_shift = broadcast<T>(kShared ? T(0) : in.row_shift[i]);
      const V row_count = broadcast<T>(in.rows.count[i]), row_inverse = broadcast<T>(in.rows.inverse_count[i]);
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        const V x = load(s + j);
        const V shared = kShared ? exp2_in_range<T>(x, {in.factor, in.factor_low}, T(0)) : V{};
        const V row_weight = by_row.weight(j, in.shape, row_count, row_inverse);
        V from_row = row_coef * row_weight;
        from_row *= kShared ? shared : exp_shifted<T>(x, T(1), row_shift);
        if (!kShared) from_row = row_weight >= smallest_weight<T>() ? from_row : V{};
        if (kMasked) from_row = keep<T>(classes.pair[r] + j, kColumnIsNegative, from_row, V{});
        if (kColumns) {
          const V col_weight = by_col.weight(j, in.shape, load(in.cols.count + j), load(in.cols.inverse_count + j));
          V from_col = load(in.col_coef + j) * col_weight;
          from_col *= kShared ? shared : exp_shifted<T>(x, T(1), load(in.col_shift + j));
          if (!kShared) from_col = col_weight >= smallest_weight<T>() ? from_col : V{};
          if (kMasked) from_col = keep<T>(classes.pair[r] + j, kRowIsNegative, from_col, V{});
          from_row += from_col;
        }
        store(s + j, from_row);
      }
    }
  }
};

template <class T>
void extremes(const Tile<T>& tile, const Extremes<T>& out) {
  for_each_strip<ExtremesStrip<T>>(tile, out);
}

template <class T>
void rank_keys(const Tile<T>& tile, const RankKeys<T>& out) {
  for_each_strip<RankKeysStrip<T>>(tile, out);
}

template <class T>
void bin_counts(const Tile<T>& tile, const BinCounts<T>& out) {
  for_each_strip<BinCountsStrip<T>>(tile, out);
}

template <class T>
void ranked_sums(const Tile<T>& tile, const RankedSums<T>& out) {
  for_each_strip<RankedSumsStrip<T>>(tile, out);
}

template <class T>
void ranked_weights(const Tile<T>& tile, const RankedWeights<T>& in) {
  if (in.col_coef == nullptr)
    for_each_strip<RankedWeightsStrip<T, false, false>>(tile, in);
  else if (in.shared)
    for_each_strip<RankedWeightsStrip<T, true, true>>(tile, in);
  else
    for_each_strip<RankedWeightsStrip<T, true, false>>(tile, in);
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
