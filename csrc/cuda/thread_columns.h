// What a thread of the forward makes of its logits for the columns of a tile: sums over rows, in an order that never
// changes. Its own two rows come first; then the eight lanes of a warp that hold the same columns, by a butterfly in
// which each lane keeps half of its columns and gives the other half away, 28 exchanges for 32 columns; then the warps,
// in their order. Plain arithmetic, so that a host can play whole blocks (tests/csrc/cuda).
#pragma once

#include <cstdint>

#include "exponentials.h"
#include "partials.h"
#include "tile_mask.h"

namespace contrastive_ext {
namespace hopper {

// A sum of exponentials, beside its shift where that moves.
template <bool kOnline>
struct ColumnSum {
  float sum;
  static constexpr float kIgnored = 0;
  static CE_HOST_DEVICE ColumnSum of(float term, float) { return {term}; }
  CE_HOST_DEVICE void merge(const ColumnSum& other) { sum += other.sum; }
  CE_HOST_DEVICE OnlineLse<float> lse() const { return {sum, 0}; }
};

template <>
struct ColumnSum<true> {
  float sum, shift;  // beside a shift of -inf the sum means nothing unless it is NaN
  static constexpr float kIgnored = -INFINITY;
  static CE_HOST_DEVICE ColumnSum of(float logit, float factor) { return {1, rounded_product(logit, factor)}; }
  CE_HOST_DEVICE void merge(const ColumnSum& other) {  // one exponential for two sums; NaN reaches the sum
    const float less = exp2_fast(shift == other.shift ? 0.0f : -fabsf(shift - other.shift) * kLog2E);
    const bool moves = shift < other.shift;
    sum = moves ? fmaf(sum, less, other.sum) : fmaf(other.sum, less, sum);
    shift = fmaxf(shift, other.shift);
  }
  CE_HOST_DEVICE OnlineLse<float> lse() const { return {shift == -INFINITY && sum == sum ? 0.0f : sum, shift}; }
};

// A thread has a sum for each bit of a row's mask (tile_mask.h). Lanes l and l ^ 16 share them out, the upper lane
// takes the upper half; then l and l ^ 8, l and l ^ 4, until a lane has four: bits (l & 28) + k, which lie at place 4 l
// + k.
constexpr int kSumsOfThread = 32, kSumsOfLane = 4;

constexpr CE_HOST_DEVICE int column_of_place(int place) {
  const int lane = place / kSumsOfLane, bit = (lane & 28) + place % kSumsOfLane;
  return lane % 4 * 2 + bit / 2 * 8 + bit % 2;
}

template <class Sum>
struct Shares {
  Sum kept, given;
  CE_HOST_DEVICE Shares(const Sum& lower, const Sum& upper, bool is_upper)
      : kept(is_upper ? upper : lower), given(is_upper ? lower : upper) {}
};

// The sum of both rows of a thread at `bit`, of its exponentials of a tile or, with a shift, of its logits; and how
// many are kept.
template <bool kOnline, int kLogits, class Kept>
CE_HOST_DEVICE ColumnSum<kOnline> sum_of_rows(const float (&s)[kLogits], float factor, const Kept& kept, int bit) {
  static_assert(kLogits == 2 * kSumsOfThread, "two rows");
  const auto of_row = [&](int h) {
    using Sum = ColumnSum<kOnline>;
    return Sum::of(kept(h, bit) ? s[bit / 2 * 4 + 2 * h + bit % 2] : Sum::kIgnored, factor);
  };
  ColumnSum<kOnline> sum = of_row(0);
  sum.merge(of_row(1));
  return sum;
}
CE_HOST_DEVICE ColumnSum<false> count_of_rows(const KeptBits& kept, int bit) {
  return {static_cast<float>(kept(0, bit)) + static_cast<float>(kept(1, bit))};
}

// The rows among `first` and first + 8, the thread's, that a tile's columns have as negatives; `column` is the thread's
// first of them.
CE_HOST_DEVICE KeptBits negatives_of_columns(int64_t first, int64_t n, int column, int64_t j0, const DevicePairs& pairs,
                                             int64_t m) {
  KeptBits kept;
  CE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first + 8 * h < n ? first + 8 * h : n - 1;
    const uint32_t bits = negatives_of_thread<kSumsOfThread>(pairs, row, j0, column, m, /*reverse=*/true);
    kept.of_row[h] = bits & (first + 8 * h < n ? ~uint32_t{0} : 0);
  }
  return kept;
}

}  // namespace hopper
}  // namespace contrastive_ext
