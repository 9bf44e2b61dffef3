// What happens to a batch before and after the sweeps: rows to unit length, rounded to the operand dtype, and the
// positives' products; backward the gradient of all of it, in one pass. numerics.normalize says what is promised.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace contrastive_ext {

constexpr int kLanes = 16;                       // partial sums: independent, so that they become vectors
constexpr int64_t kElementsPerThread = 1 << 16;  // a pass over fewer takes no longer than waking a thread

template <class T>
inline T dot(const T* a, const T* b, int64_t d) {
  T lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[c + l] * b[c + l];
  for (int l = 0; c < d; ++c, ++l) lanes[l] += a[c] * b[c];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Calls body(row) for every row of d elements, on several threads where the rows are many.
template <class Body>
inline void for_each_row(int64_t rows, int64_t d, const Body& body) {
  const int64_t grain = kElementsPerThread / d + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Divides a row by its length and returns that: infinite for a row so short that its squares underflow, so that it
// becomes 0. A row of finite elements whose squares overflow is scaled before it is squared.
template <class T>
inline T to_unit_length(T* z, int64_t d) {
  constexpr T kInfinite = std::numeric_limits<T>::infinity();
  T norm = std::sqrt(dot(z, z, d)), shrink = 1;
  if (norm == kInfinite) {
    shrink = std::ldexp(T(1), -3 * std::numeric_limits<T>::max_exponent / 4);
    for (int64_t c = 0; c < d; ++c) z[c] *= shrink;
    norm = std::sqrt(dot(z, z, d));
  }
  if (norm <= std::sqrt(std::numeric_limits<T>::min())) norm = kInfinite;
  for (int64_t c = 0; c < d; ++c) z[c] /= norm;  // times a reciprocal a row of one feature would not be exactly 1 or -1
  return norm / shrink;
}

// operand = z/|z| (z itself without `norm`, an infinity as NaN) rounded to In, kept as T; *norm receives |z|.
template <class T, class In>
inline void prepare_row(const In* z, int64_t d, T* operand, T* norm) {
  for (int64_t c = 0; c < d; ++c) operand[c] = static_cast<T>(z[c]);
  if (norm)
    *norm = to_unit_length(operand, d);
  else
    for (int64_t c = 0; c < d; ++c) operand[c] -= operand[c] - operand[c];
  for (int64_t c = 0; c < d; ++c) operand[c] = static_cast<T>(static_cast<In>(operand[c]));
}

// dz of a row from the gradient of its operand plus `by_cosine` times its partner (null: none). The gradient passes the
// rounding unchanged. `gradient` is overwritten.
template <class T, class In>
inline void row_gradient(const In* z, const T* norm, const T* partner, T by_cosine, int64_t d, T* gradient, In* dz) {
  if (partner)
    for (int64_t c = 0; c < d; ++c) gradient[c] += by_cosine * partner[c];
  if (norm) {
    T lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<T>(z[c + l]) / *norm * gradient[c + l];
    for (int l = 0; c < d; ++c, ++l) lanes[l] += static_cast<T>(z[c]) / *norm * gradient[c];
    T radial = 0;
    for (int l = 0; l < kLanes; ++l) radial += lanes[l];
    for (c = 0; c < d; ++c) dz[c] = static_cast<In>((gradient[c] - static_cast<T>(z[c]) / *norm * radial) / *norm);
  } else {
    for (int64_t c = 0; c < d; ++c) dz[c] = static_cast<In>(gradient[c]);
  }
}

}  // namespace contrastive_ext
