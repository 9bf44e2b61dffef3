// Operands that are bf16 numbers, laid out once a call for products by tile registers, and those products.
//
// What decides are the values, not a dtype: 16-bit inputs arrive widened, and a product of bf16 numbers is exact either
// way. Weights of a gradient are cut into three bf16 parts that are the float32 weight in every bit, so both paths add
// the same products and differ in the order alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "../compat.h"
#include "bf16_product.h"
#include "tile.h"
#include "workspace.h"

namespace contrastive_ext {

class Bf16Operands {
 public:
  // u [n, d] and v [m, d]; one_set: v is u. Empty where the products are to be widened.
  template <class T>
  Bf16Operands(const T* u, int64_t n, const T* v, int64_t m, int64_t d, bool one_set) : d_(d) {
    if constexpr (std::is_same_v<T, float>) {
      const Bf16Kernels* kernels = chosen_bf16().kernels;
      if (!kernels || !are_bf16(u, n * d) || (!one_set && !are_bf16(v, m * d))) return;
      kernels_ = kernels;
      // a product may begin at any row and reads a whole block from there
      n_ = padded_to(kTileBlock, n) + kTileBlock, m_ = padded_to(kTileBlock, m) + kTileBlock;
      depth_ = padded_to(kTileDepth, d);
      fill_rows(u, n), fill_columns(v, m);
      fill_pairs(v_pairs_, v, m, m_);
      if (!one_set) fill_pairs(u_pairs_, u, n, n_);
      one_set_ = one_set;
    }
  }
  explicit operator bool() const { return kernels_ != nullptr; }

  const Bf16Kernels& kernels() const { return *kernels_; }
  int64_t d() const { return d_; }

  // s[rows, cols] = scale u v^T, of u from row i0 and v from column j0 on, a multiple of kTileRows. With
  // `above_diagonal` what lies below it (row 0 is column j0 - `offset`) holds anything.
  void scores(float* s, int64_t ld, double scale, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
              bool above_diagonal, int64_t offset) const {
    for (int64_t j = 0, width; j < cols; j += width) {
      const bool cut = above_diagonal && offset + j < rows;
      width = cut ? std::min(kTileBlock, cols - j) : cols - j;
      const int64_t needed = cut ? std::min(rows, offset + j + width) : rows;
      kernels_->product({s + j, ld, rows_.get() + i0 * depth_, depth_, 0, 1, columns_.get() + (j0 + j) * depth_,
                         kTileRows * depth_, needed, width, d_, static_cast<float>(scale), /*accumulate=*/false});
    }
  }

  // The vectors as the right side of a product with weights: panels of kTileRows features.
  struct Pairs {
    const uint16_t* data;
    int64_t panel;
    const uint16_t* at(int64_t vector) const { return data + vector * kTileRows; }
  };
  Pairs u_pairs() const { return one_set_ ? v_pairs() : Pairs{u_pairs_.get(), n_ * kTileRows}; }
  Pairs v_pairs() const { return {v_pairs_.get(), m_ * kTileRows}; }

 private:
  // Whether all are bf16 numbers, and the largest one such that no product with parts of weights is flushed to zero or
  // overflows where it matters. NaN and infinities are left to the widened path.
  static bool are_bf16(const float* x, int64_t size) {
    constexpr uint32_t kSmallest = 0x37800000, kLargest = 0x4e800000;  // 2^-16, 2^30
    std::atomic<uint32_t> rest{0}, largest{0};
    const auto look = [&](int64_t begin, int64_t end) {
      uint32_t lower = 0, largest_here = 0;
      for (int64_t i = begin; i < end; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        lower |= bits & 0xffffu;
        largest_here = std::max(largest_here, bits & 0x7fffffffu);
      }
      rest.fetch_or(lower);
      for (uint32_t before = largest; before < largest_here && !largest.compare_exchange_weak(before, largest_here);) {
      }
    };
    look(0, std::min<int64_t>(size, 64));  // numbers of float32 show it at once
    if (rest.load() != 0) return false;
    torch::stable::parallel_for(0, size, 1 << 16, look);
    return rest.load() == 0 && largest.load() >= kSmallest && largest.load() <= kLargest;
  }

  static uint16_t upper_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }

  static Workspace<uint16_t> zeros(int64_t size) {
    Workspace<uint16_t> out(size);
    std::fill(out.get(), out.get() + size, uint16_t{0});
    return out;
  }

  // Calls body(vector) for all of them, shared out to threads.
  template <class Body>
  void for_each_vector(int64_t count, const Body& body) const {
    torch::stable::parallel_for(0, count, 1 + (1 << 15) / d_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // Row by row.
  void fill_rows(const float* x, int64_t count) {
    rows_ = zeros(n_ * depth_);
    for_each_vector(count, [&](int64_t i) {
      for (int64_t k = 0; k < d_; ++k) rows_.get()[i * depth_ + k] = upper_half(x[i * d_ + k]);
    });
  }

  // Panels of kTileRows vectors, two features side by side.
  void fill_columns(const float* x, int64_t count) {
    columns_ = zeros(m_ * depth_);
    for_each_vector(count, [&](int64_t j) {
      uint16_t* column = columns_.get() + j / kTileRows * kTileRows * depth_ + 2 * (j % kTileRows);
      for (int64_t k = 0; k < d_; ++k) column[k / 2 * 2 * kTileRows + k % 2] = upper_half(x[j * d_ + k]);
    });
  }

  // Panels of kTileRows features, two vectors side by side.
  void fill_pairs(Workspace<uint16_t>& out, const float* x, int64_t count, int64_t padded) const {
    out = zeros(padded * depth_);
    for_each_vector(count, [&](int64_t j) {
      uint16_t* pair = out.get() + j / 2 * 2 * kTileRows + j % 2;
      for (int64_t k = 0; k < d_; ++k)
        pair[k / kTileRows * kTileRows * padded + 2 * (k % kTileRows)] = upper_half(x[j * d_ + k]);
    });
  }

  int64_t d_, n_ = 0, m_ = 0, depth_ = 0;  // n_, m_, depth_: padded
  bool one_set_ = false;
  const Bf16Kernels* kernels_ = nullptr;
  Workspace<uint16_t> rows_, columns_, v_pairs_, u_pairs_;
};

// Products of a tile's weights with such operands; one per thread. Weights are cut kTileBlock rows at a time.
class Bf16Combiner {
 public:
  Bf16Combiner(const Bf16Operands& operands, int64_t block_rows, int64_t tile_cols) : operands_(operands) {
    if (!operands) return;
    const int64_t depth = padded_to(kTileDepth, std::max(block_rows, tile_cols));
    parts_ = Workspace<uint16_t>(kWeightParts * kTileBlock * depth);
    turned_ = Workspace<float>(kTileBlock * padded_to(kTileDepth, block_rows));
  }
  explicit operator bool() const { return static_cast<bool>(operands_); }

  // out[rows, d] (+)= w v for rows <= kTileBlock weights of columns [j0, j0 + cols), j0 even. False, and nothing done,
  // where a weight is not finite.
  bool weigh_columns(float* out, const float* w, int64_t ld, int64_t rows, int64_t j0, int64_t cols,
                     bool accumulate) const {
    return combine(out, w, ld, rows, cols, operands_.v_pairs(), j0, accumulate);
  }

  // out[cols, d] (+)= w^T u for cols <= kTileBlock weights of rows [i0, i0 + rows), i0 even.
  bool weigh_rows(float* out, const float* w, int64_t ld, int64_t cols, int64_t i0, int64_t rows,
                  bool accumulate) const {
    const int64_t turned_row = padded_to(kTileDepth, rows);
    tile_kernels<float>().transpose(turned_.get(), turned_row, w, ld, rows, cols);
    return combine(out, turned_.get(), turned_row, cols, rows, operands_.u_pairs(), i0, accumulate);
  }

 private:
  bool combine(float* out, const float* w, int64_t w_row, int64_t rows, int64_t depth,
               const Bf16Operands::Pairs& vectors, int64_t first, bool accumulate) const {
    const int64_t parts_row = padded_to(kTileDepth, depth);
    float scale;
    if (!operands_.kernels().split({w, w_row, rows, depth, parts_.get(), parts_row}, &scale)) return false;
    operands_.kernels().product({out, operands_.d(), parts_.get(), parts_row, kTileBlock * parts_row, kWeightParts,
                                 vectors.at(first), vectors.panel, rows, operands_.d(), depth, scale, accumulate});
    return true;
  }

  const Bf16Operands& operands_;
  Workspace<uint16_t> parts_;
  Workspace<float> turned_;
};

}  // namespace contrastive_ext
