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

// 1/|z|, 0 for a row so short that its squares underflow.
template <class T>
inline T inverse_norm(const T* z, int64_t d) {
  const T norm = std::sqrt(dot(z, z, d));
  return norm <= std::sqrt(std::numeric_limits<T>::min()) ? T(0) : T(1) / norm;
}

// operand = z/|z| (z itself without `inverse`) rounded to In, kept as T; *inverse receives 1/|z|.
template <class T, class In>
inline void prepare_row(const In* z, int64_t d, T* operand, T* inverse) {
  for (int64_t c = 0; c < d; ++c) operand[c] = static_cast<T>(z[c]);
  if (!inverse) return;
  *inverse = inverse_norm(operand, d);
  for (int64_t c = 0; c < d; ++c) operand[c] = static_cast<T>(static_cast<In>(operand[c] * *inverse));
}

// dz of a row from the gradient of its operand plus `by_cosine` times its partner (null: none). The gradient passes the
// rounding unchanged. `gradient` is overwritten.
template <class T, class In>
inline void row_gradient(const In* z, const T* inverse, const T* partner, T by_cosine, int64_t d, T* gradient, In* dz) {
  if (partner)
    for (int64_t c = 0; c < d; ++c) gradient[c] += by_cosine * partner[c];
  if (inverse) {
    T lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<T>(z[c + l]) * *inverse * gradient[c + l];
    for (int l = 0; c < d; ++c, ++l) lanes[l] += static_cast<T>(z[c]) * *inverse * gradient[c];
    T radial = 0;
    for (int l = 0; l < kLanes; ++l) radial += lanes[l];
    for (c = 0; c < d; ++c)
      dz[c] = static_cast<In>((gradient[c] - static_cast<T>(z[c]) * *inverse * radial) * *inverse);
  } else {
    for (int64_t c = 0; c < d; ++c) dz[c] = static_cast<In>(gradient[c]);
  }
}

}  // namespace contrastive_ext
