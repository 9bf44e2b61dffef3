// How far exponentials may reach: the choice between a static shift (or none) and the online maximum.
#pragma once

#include "host_device.h"

namespace contrastive_ext {

// The exponent range of T that a static shift may use: sums of up to 2^24 terms must stay below the largest number and
// the smallest term of unit rows (rounded to 16 bits: cosines up to 1.008) above the smallest normal one.
template <class T>
struct ExponentRange;
template <>
struct ExponentRange<float> {
  static constexpr double kLowest = -124.0, kHighest = 100.0;
  static constexpr double kProduct = 64.0;  // backward: exp(beta s) times a coefficient that holds exp(-lse)
};
template <>
struct ExponentRange<double> {
  static constexpr double kLowest = -1000.0, kHighest = 900.0;
  static constexpr double kProduct = 480.0;
};

// Whether unit rows need no shift at all: every exp(beta s) lies between 2^-reach and 2^reach. False for NaN.
CE_HOST_DEVICE bool fits_without_shift(float reach) {
  return reach <= static_cast<float>(ExponentRange<float>::kHighest);
}

}  // namespace contrastive_ext
