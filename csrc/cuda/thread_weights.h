// What a thread of the backward makes of its logits: weights of two rows, a quarter of their columns in every tile (see
// Fragment). Plain arithmetic, so that a host can play whole blocks (tests/csrc/cuda).
#pragma once

#include <cstdint>

#include "terms.h"
#include "tile_mask.h"

namespace contrastive_ext {
namespace hopper {

// Which directions of a pair weigh something.
enum class Terms { kRows, kColumns, kBoth };
constexpr CE_HOST_DEVICE bool has_rows(Terms terms) { return terms != Terms::kColumns; }
constexpr CE_HOST_DEVICE bool has_columns(Terms terms) { return terms != Terms::kRows; }

template <int kLogits, Terms kTerms, bool kFactored>
struct ThreadWeights {
  static_assert(kTerms == Terms::kBoth || !kFactored, "one direction has nothing to factor");
  static constexpr int kColumns = 2 * kLogits;  // of a tile
  int64_t index[2];                             // rows beyond the last one repeat it; nobody stores them
  RowTerm term[2];

  // Turns the logits of a tile that needs no mask into weights. `vectors` [2][kColumns] hold the coefficients and lse
  // of the tile's columns, `column` is the thread's first.
  CE_HOST_DEVICE void weigh(float (&s)[kLogits], float factor, const float* vectors, int column) const {
    for_all(s, vectors, column, [&](float& x, int h, int, ColumnTerm of_column) {
      x = weight(x, factor, term[h], of_column, /*forward=*/true, /*reverse=*/true);
    });
  }

  // The same where pairs may be ignored: their weights are 0, whatever their logits.
  CE_HOST_DEVICE void weigh_masked(float (&s)[kLogits], float factor, const float* vectors, int column, int64_t j0,
                                   const DevicePairs& pairs, int64_t m) const {
    uint32_t forward[2] = {}, reverse[2] = {};
    CE_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (has_rows(kTerms)) forward[h] = negatives_of_thread<kLogits / 2>(pairs, index[h], j0, column, m);
      if (has_columns(kTerms))
        reverse[h] = has_rows(kTerms) && !pairs.has_ids()
                         ? forward[h]
                         : negatives_of_thread<kLogits / 2>(pairs, index[h], j0, column, m, /*reverse=*/true);
    }
    for_all(s, vectors, column, [&](float& x, int h, int bit, ColumnTerm of_column) {
      const bool keep = forward[h] >> bit & 1, keep_reverse = reverse[h] >> bit & 1;
      x = keep || keep_reverse ? weight(x, factor, term[h], of_column, keep, keep_reverse) : 0.0f;
    });
  }

 private:
  static CE_HOST_DEVICE float weight(float s, float factor, const RowTerm& row, ColumnTerm column, bool forward,
                                     bool reverse) {
    if (kFactored) {
      const float of_row = forward ? row.coefficient : 0.0f, of_column = reverse ? column.coefficient : 0.0f;
      return exp2_fast(s * factor) * fmaf(of_column, row.columns, of_row);
    }
    float w = 0;
    if (has_rows(kTerms) && forward) w = row.coefficient * exp2_fast(fmaf(s, factor, -row.lse));
    if (has_columns(kTerms) && reverse) {
      const float coefficient = has_rows(kTerms) ? column.coefficient * row.columns : column.coefficient;
      w = fmaf(coefficient, exp2_fast(fmaf(s, factor, -column.lse)), w);
    }
    return w;
  }

  struct alignas(8) Pair {
    float x[2];
  };

  // function(logit, which of the two rows, bit of its mask, term of its column), column by column
  template <class Function>
  static CE_HOST_DEVICE void for_all(float (&s)[kLogits], const float* vectors, int column, const Function& function) {
    CE_UNROLL
    for (int g = 0; g < kLogits / 4; ++g) {
      Pair coefficient{}, lse{};
      if (has_columns(kTerms)) coefficient = reinterpret_cast<const Pair*>(vectors + column)[4 * g];
      if (has_columns(kTerms) && !kFactored) lse = reinterpret_cast<const Pair*>(vectors + kColumns + column)[4 * g];
      CE_UNROLL
      for (int k = 0; k < 4; ++k)
        function(s[4 * g + k], k / 2, 2 * g + k % 2, ColumnTerm{coefficient.x[k % 2], lse.x[k % 2]});
    }
  }
};

}  // namespace hopper
}  // namespace contrastive_ext
