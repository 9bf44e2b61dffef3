// A log-sum-exp that grows: sum of exp(x - shift) beside its shift.
//
// With a static shift the shift never moves and `add` is a plain addition; with the online maximum `raise` rescales
// what is already there. NaN never moves the shift, it reaches the sum.
#pragma once

#include <cmath>

#include "host_device.h"

namespace contrastive_ext {

template <class T>
struct OnlineLse {
  T sum = 0;
  T shift = -INFINITY;  // -inf: nothing but NaN or -inf was added so far

  // Moves the shift up to `candidate` if that is larger. Returns the factor that the old terms were multiplied by.
  CE_HOST_DEVICE T raise(T candidate) {
    if (!(candidate > shift)) return 1;
    const T factor = exp(shift - candidate);
    sum *= factor;
    shift = candidate;
    return factor;
  }

  // Adds `terms` = a sum of exp(x - terms_shift).
  CE_HOST_DEVICE void add(T terms_shift, T terms) {
    raise(terms_shift);
    sum += terms_shift == shift ? terms : terms * exp(terms_shift - shift);
  }

  CE_HOST_DEVICE void merge(const OnlineLse& other) { add(other.shift, other.sum); }

  // -inf for an empty sum, NaN for a NaN sum.
  CE_HOST_DEVICE T lse() const {
    if (sum == 0) return -INFINITY;
    return (shift == -INFINITY ? T(0) : shift) + log(sum);
  }
};

}  // namespace contrastive_ext
