// The passes over a tile of losses that are sums over pairs: softplus of every kept pair, and its derivative.
//
// With y = exp(-|x|) in [0, 1] nothing overflows and small terms keep their digits: softplus(x) = max(x, 0) + log1p(y),
// sigmoid(x) = 1/(1 + y) or y/(1 + y). log1p(y) = 2 atanh(t), t = y/(2 + y) <= 1/3, by its series.
#pragma once

#include "strips.h"

namespace contrastive_ext {
namespace CE_ISA {

// Terms t^(2k + 1)/(2k + 1) of atanh: the first one left out is below a quarter of an ulp at t = 1/3.
template <class T>
struct AtanhSeries {
  static constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
};

template <class T>
inline typename Simd<T>::V log1p_of_unit(typename Simd<T>::V y) {
  using V = typename Simd<T>::V;
  const V t = y / (y + T(2)), square = t * t;
  V sum = broadcast<T>(T(1) / T(2 * AtanhSeries<T>::kTerms - 1));
  for (int k = AtanhSeries<T>::kTerms - 2; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
  return (t + t) * sum;
}

template <class T>
inline typename Simd<T>::V exp_of_minus_size(typename Simd<T>::V x) {
  return exp<T>(x > T(0) ? -x : x);
}

template <class T>
struct SoftplusStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const SoftplusSums<T>& out) {
    using V = typename Simd<T>::V;
    const V zero{};
    for (int r = 0; r < kRowStep; ++r) {
      const V offset = broadcast<T>(out.offset[row + r]);
      V sum = zero, slope = zero;
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        const V x = load(tile.s + (row + r) * tile.ld + j) * out.sign + offset;
        const V y = exp_of_minus_size<T>(x), inverse = T(1) / (y + T(1));
        V value = log1p_of_unit<T>(y) + (x > T(0) ? x : zero);
        V share = x > T(0) ? inverse : y * inverse;
        if (kMasked) {
          const uint8_t* pair = classes.pair[r] + j;
          value = keep<T>(pair, kColumnIsNegative, value, zero);
          share = keep<T>(pair, kColumnIsNegative, share, zero);
        }
        sum += value, slope += share;
      }
      out.row_sum[row + r] = horizontal_sum<T>(sum);
      out.row_slope[row + r] = horizontal_sum<T>(slope);
    }
  }
};

template <class T>
struct SigmoidStrip {
  template <bool kMasked>
  static void run(const Tile<T>& tile, int64_t row, const StripClasses& classes, const SigmoidWeights<T>& in) {
    using V = typename Simd<T>::V;
    const V zero{};
    for (int r = 0; r < kRowStep; ++r) {
      const V offset = broadcast<T>(in.offset[row + r]), coef = broadcast<T>(in.coef[row + r]);
      for (int64_t j = 0; j < tile.cols; j += Simd<T>::kWidth) {
        T* at = tile.s + (row + r) * tile.ld + j;
        const V x = load(at) * in.sign + offset;
        const V y = exp_of_minus_size<T>(x), inverse = coef / (y + T(1));
        const V weight = x > T(0) ? inverse : y * inverse;
        store(at, kMasked ? keep<T>(classes.pair[r] + j, kColumnIsNegative, weight, zero) : weight);
      }
    }
  }
};

template <class T>
void softplus_sums(const Tile<T>& tile, const SoftplusSums<T>& out) {
  for_each_strip<SoftplusStrip<T>>(tile, out);
}

template <class T>
void sigmoid_weights(const Tile<T>& tile, const SigmoidWeights<T>& in) {
  for_each_strip<SigmoidStrip<T>>(tile, in);
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
