// Vector exponentials: 2^(x c - shift) = 2^n p(f) with n = round(x c), f = x c - n, p a polynomial on [-1/2, 1/2].
//
// c comes as a sum of two numbers and f from fused multiply-adds, so the result is as accurate for a large |x c| as for
// a small one; an integer shift only moves the exponent field and costs no accuracy (that is what lets a static shift
// be as accurate as subtracting the maximum). p is minimax in relative error with p(0) = 1: 2.6e-9 at degree 6
// (float), 1.8e-17 at degree 11 (double). Bounds, measured by tests/csrc/cpu on every compiled path: 1.25 ulp in the
// normal range with FMA; without FMA (generic on x86-64) 1.6 ulp plus |x c| ulp, since the products round. NaN stays
// NaN.
#pragma once

#include "simd.h"

namespace contrastive_ext {
namespace CE_ISA {

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  static constexpr int kDegree = 6;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLowest = -88.0297f, kHighest = 88.7229f;  // times log2(e): -127 and 128
  static constexpr float kRound = 0x1.8p23f + 127.0f;  // adding it leaves n + the exponent bias in the low bits
  static constexpr float kCoefficient[kDegree + 1] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbe0p-3f, 0x1.c6aeccp-5f,
                                                      0x1.3b2a1cp-7f, 0x1.5f48c0p-10f, 0x1.444000p-13f};
};

template <>
struct Exp2Constants<double> {
  static constexpr int kDegree = 11;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLowest = -709.0896, kHighest = 709.7828;
  static constexpr double kRound = 0x1.8p52 + 1023.0;
  static constexpr double kCoefficient[kDegree + 1] = {1.0,
                                                       0x1.62e42fefa39f3p-1,
                                                       0x1.ebfbdff82c598p-3,
                                                       0x1.c6b08d7048f31p-5,
                                                       0x1.3b2ab6fba1e1cp-7,
                                                       0x1.5d87fe7bbbe07p-10,
                                                       0x1.4309130961163p-13,
                                                       0x1.ffcbee3b0af8cp-17,
                                                       0x1.62bfd49ed0adfp-20,
                                                       0x1.b54167a0b9061p-24,
                                                       0x1.e605f979c7a5dp-28,
                                                       0x1.c0638527edf34p-32};
};

// The constant c of 2^(x c), in two parts.
template <class T>
struct ExpFactor {
  T high, low;
};

// log2(e)
template <class T>
inline ExpFactor<T> log2_e() {
  constexpr double kLog2E = 1.4426950408889634074, kRest = 2.0355273740931033e-17;
  constexpr T high = static_cast<T>(kLog2E);
  return {high, static_cast<T>((kLog2E - static_cast<double>(high)) + kRest)};
}

// 2^(x c - shift) where the caller knows that x c - shift is in the exponent range of T. `shift` is an integer.
template <class T>
inline typename Simd<T>::V exp2_in_range(typename Simd<T>::V x, ExpFactor<T> c, T shift) {
  using C = Exp2Constants<T>;
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  const T round = C::kRound - shift;
  const V rounded = x * c.high + C::kRound;
  const V n = rounded - C::kRound;
  V f = x * c.high - n;
  f = x * c.low + f;
  V p = broadcast<T>(C::kCoefficient[C::kDegree]);
  for (int k = C::kDegree - 1; k >= 0; --k) p = p * f + C::kCoefficient[k];
  // The scale is a factor, not an addition to the exponent field: a NaN survives it, 2^-127 is 0 and 2^128 is inf.
  const V biased = n + round;
  I bits;
  memcpy(&bits, &biased, sizeof(bits));
  bits = bits << C::kMantissaBits;
  V scale;
  memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// exp(x) for any x: 0 below the normal range, inf above it.
template <class T>
inline typename Simd<T>::V exp(typename Simd<T>::V x) {
  using C = Exp2Constants<T>;
  x = x < C::kLowest ? broadcast<T>(C::kLowest) : x;  // false for NaN: it stays
  x = x > C::kHighest ? broadcast<T>(C::kHighest) : x;
  return exp2_in_range<T>(x, log2_e<T>(), T(0));
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
