// What the backward has to know of an anchor: its lse and the coefficient a = dL/d lse, brought to a form of which
// every pair takes one number or two. Plain arithmetic, for kernels and for a host that plays them (tests/csrc/cuda).
//
//   w_ij = beta (a_i exp(beta s_ij - lse_i)       where column j is a negative of row i
//              + c_j exp(beta s_ij - lse'_j))     where row i is a negative of column j
//
// Factored, one exponential serves both: exp(beta s_ij) (beta a_i exp(-lse_i) + beta c_j exp(-lse'_j)), as long as each
// factor stays in float32's normal range. Everything is in units of log 2.
//
// Weights become 16-bit operands. A power of two for every row brings its largest possible weight, beta (|a_i| + max_j
// |c_j|), to 2^14, so that fp16 neither overflows nor underflows where it matters; bf16, which needs none of it, takes
// the same road. What columns bring carries a power of its own, that of the largest coefficient of all, because
// coefficients times exp(-lse) must not underflow either.
#pragma once

#include <cstdint>
#include <cstring>

#include "../exponent_range.h"
#include "exponentials.h"

namespace contrastive_ext {
namespace hopper {

constexpr int kLargestExponent = 14;  // of scaled weights

// Whether exponents of unit rows are small enough for one exponential: 2^64 leaves as much to coefficients.
CE_HOST_DEVICE bool fits_factored(bool unit, float reach) {
  return unit && reach <= static_cast<float>(ExponentRange<float>::kProduct);
}

CE_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

CE_HOST_DEVICE float power_of_two(int exponent) {  // -126 to 127
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// The power of two that brings x >= 0 to at most 2^kLargestExponent and above half of that, as an exponent within
// +-100: more would leave the range of float32.
CE_HOST_DEVICE int exponent_to_largest(float x) {
  const int above = static_cast<int>((bits_of(x) + 0x7FFFFF) >> 23) - 127;  // x <= 2^above
  const int exponent = kLargestExponent - above;
  return exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
}

// lse in units of log 2. An anchor without negatives weighs exp2(x - inf) = 0, not NaN.
CE_HOST_DEVICE float lse_of_term(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// An anchor as a column.
struct ColumnTerm {
  float coefficient;  // beta c 2^power [exp(-lse)]
  float lse;

  // bound: the largest |a| and |c| of all
  static CE_HOST_DEVICE ColumnTerm of(float lse, float c, float beta, float bound, bool factored) {
    ColumnTerm term{beta * c * power_of_two(exponent_to_largest(beta * bound)), lse_of_term(lse)};
    if (factored) term.coefficient *= exp2_fast(-term.lse);
    return term;
  }
};

// An anchor as a row.
struct RowTerm {
  float coefficient = 0;  // beta a 2^exponent [exp(-lse)]; 0 where rows have no term
  float lse = INFINITY;
  float columns = 1;  // what brings the columns' coefficients to this row's power
  int exponent;       // of the row's weights

  // a: 0 where rows have no term; largest: of |c|, 0 where columns have none; bound: as of the columns
  CE_HOST_DEVICE RowTerm(float lse, float a, float beta, float largest, float bound, bool factored)
      : lse(lse_of_term(lse)), exponent(exponent_to_largest(beta * (fabsf(a) + largest))) {
    if (largest > 0) {
      const int of_columns = exponent_to_largest(beta * bound);
      if (exponent > of_columns + 100) exponent = of_columns + 100;
      if (exponent < of_columns - 1) exponent = of_columns - 1;  // only of a coefficient that is NaN
      columns = power_of_two(exponent - of_columns);
    }
    coefficient = beta * a * power_of_two(exponent);
    if (factored) coefficient *= exp2_fast(-this->lse);
  }
};

}  // namespace hopper
}  // namespace contrastive_ext
