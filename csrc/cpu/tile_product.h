// Matrix products out of registers: kRows x kVectors accumulators take one element of a and kVectors vectors of b at a
// time, so that a step loads far less than it multiplies. A share of b, kDepth rows of kProductColumns columns, serves
// all rows of a; it is copied together for as many rows as repay that. a is read where it is, transposed or not.
//
// Every element of c is a sum in the order of k, in blocks of kDepth: the same bits wherever it stands in a tile and
// whatever thread makes it, and s_ij = s_ji within one set.
#pragma once

#include "simd.h"
#include "tile.h"

namespace contrastive_ext {
namespace CE_ISA {

// 24 accumulators of 32 registers, or 12 of 16.
constexpr int kProductRows = 6;
#if CE_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif
constexpr int64_t kDepth = 256;
constexpr int64_t kRowsWorthCopying = 64;  // a vector is copied by two instructions and multiplied by one a row

template <class T>
constexpr int64_t kProductColumns = kProductVectors * Simd<T>::kWidth;

// c[:, 0 : columns] for kRows rows, where the last vector may be a part of one. b has whole vectors, `stride` apart.
template <class T, int kRows, int kVectors>
inline void product_block(const Product<T>& p, T* c, const T* a, const T* b, int64_t stride, int64_t depth,
                          int64_t columns, bool add, T scale) {
  using V = typename Simd<T>::V;
  constexpr int64_t kWidth = Simd<T>::kWidth;
  V sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += p.a_depth, b += stride) {
    V column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const V row = broadcast<T>(a[r * p.a_row]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += row * column[v];
    }
  }
  for (int r = 0; r < kRows; ++r, c += p.c_row) {
    for (int v = 0; v < kVectors; ++v) {
      T* at = c + v * kWidth;
      V before{};
      if (columns >= (v + 1) * kWidth) {
        if (add) before = load(at);
        store(at, (before + sum[r][v]) * scale);
      } else {
        const size_t bytes = static_cast<size_t>(columns - v * kWidth) * sizeof(T);
        if (add) memcpy(&before, at, bytes);
        before = (before + sum[r][v]) * scale;
        memcpy(at, &before, bytes);
      }
    }
  }
}

// The same for all rows, with as many vectors as hold `columns`.
template <class T, int kVectors = kProductVectors>
inline void product_share(const Product<T>& p, T* c, const T* a, const T* b, int64_t stride, int64_t depth,
                          int64_t columns, bool add, T scale) {
  if constexpr (kVectors > 1)
    if (columns <= (kVectors - 1) * Simd<T>::kWidth)
      return product_share<T, kVectors - 1>(p, c, a, b, stride, depth, columns, add, scale);
  int64_t i = 0;
  const auto take = [&](auto block, int64_t rows) {
    for (; i + rows <= p.rows; i += rows)
      block(p, c + i * p.c_row, a + i * p.a_row, b, stride, depth, columns, add, scale);
  };
  take(product_block<T, kProductRows, kVectors>, kProductRows);
  take(product_block<T, 2, kVectors>, 2);
  take(product_block<T, 1, kVectors>, 1);
}

template <class T>
void product(const Product<T>& p) {
  constexpr int64_t kColumns = kProductColumns<T>;
  alignas(64) T share[kDepth * kColumns];
  int64_t k0 = 0;
  do {  // once for a depth of 0, too: the product is 0
    const int64_t depth = p.depth - k0 < kDepth ? p.depth - k0 : kDepth;
    const bool add = p.accumulate || k0 > 0;
    const T scale = k0 + depth == p.depth ? p.scale : T(1);
    for (int64_t j = 0; j < p.cols; j += kColumns) {
      const int64_t columns = p.cols - j < kColumns ? p.cols - j : kColumns;
      const T* b = p.b + k0 * p.b_depth + j;
      int64_t stride = p.b_depth;
      const bool whole = columns % Simd<T>::kWidth == 0;
      if (!whole || (stride != kColumns && p.rows >= kRowsWorthCopying)) {
        if (!whole) memset(share, 0, sizeof(share));
        for (int64_t k = 0; k < depth; ++k)
          memcpy(share + k * kColumns, b + k * stride, static_cast<size_t>(columns) * sizeof(T));
        b = share, stride = kColumns;
      }
      product_share(p, p.c + j, p.a + k0 * p.a_depth, b, stride, depth, columns, add, scale);
    }
    k0 += depth;
  } while (k0 < p.depth);
}

// Four by four elements at a time; compilers would scatter single ones.
template <class T>
void transpose(T* y, int64_t y_row, const T* x, int64_t x_row, int64_t rows, int64_t d) {
  typedef T V4 __attribute__((vector_size(4 * sizeof(T))));
  typedef typename Simd<T>::Lane I4 __attribute__((vector_size(4 * sizeof(T))));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t k = 0;
    for (; k + 4 <= d; k += 4) {
      V4 a, b, c, e;
      memcpy(&a, x + i * x_row + k, sizeof(V4)), memcpy(&b, x + (i + 1) * x_row + k, sizeof(V4));
      memcpy(&c, x + (i + 2) * x_row + k, sizeof(V4)), memcpy(&e, x + (i + 3) * x_row + k, sizeof(V4));
      const V4 ab = CE_SHUFFLE(I4, a, b, 0, 4, 1, 5), ab_high = CE_SHUFFLE(I4, a, b, 2, 6, 3, 7);
      const V4 ce = CE_SHUFFLE(I4, c, e, 0, 4, 1, 5), ce_high = CE_SHUFFLE(I4, c, e, 2, 6, 3, 7);
      const V4 lines[4] = {CE_SHUFFLE(I4, ab, ce, 0, 1, 4, 5), CE_SHUFFLE(I4, ab, ce, 2, 3, 6, 7),
                           CE_SHUFFLE(I4, ab_high, ce_high, 0, 1, 4, 5), CE_SHUFFLE(I4, ab_high, ce_high, 2, 3, 6, 7)};
      for (int r = 0; r < 4; ++r) memcpy(y + (k + r) * y_row + i, &lines[r], sizeof(V4));
    }
    for (; k < d; ++k)
      for (int r = 0; r < 4; ++r) y[k * y_row + i + r] = x[(i + r) * x_row + k];
  }
  for (; i < rows; ++i)
    for (int64_t k = 0; k < d; ++k) y[k * y_row + i] = x[i * x_row + k];
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
