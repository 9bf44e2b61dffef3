// Operands that are bf16 numbers, laid out once a call for products by tile registers, and those products.
//
// What decides are the values, not a dtype: 16-bit inputs arrive widened, and a product of bf16 numbers is exact either
// way. Weights of a gradient are cut into three bf16 parts that are the float32 weight in every bit, so both paths add
// the same products and differ in the order alone. On request float32 operands are cut the same way, and six products
// of parts stand for one (bf16_product.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "../compat.h"
#include "bf16_product.h"
#include "tile.h"
#include "workspace.h"

namespace contrastive_ext {

class Bf16Operands {
 public:
  // u [n, d] and v [m, d]; one_set: v is u; split: float32 numbers may be cut. Empty where the products are to be
  // widened.
  template <class T>
  Bf16Operands(const T* u, int64_t n, const T* v, int64_t m, int64_t d, bool one_set, bool split) : d_(d) {
    if constexpr (std::is_same_v<T, float>) {
      const Bf16Kernels* kernels = chosen_bf16().kernels;
      if (!kernels || n * d == 0 || m * d == 0) return;
      // numbers of float32 show it at once
      if (!split && (lower_halves(u, std::min<int64_t>(n * d, 64)) || lower_halves(v, std::min<int64_t>(m * d, 64))))
        return;
      const Numbers of_u = look_at(u, n, d), of_v = one_set ? of_u : look_at(v, m, d);
      if (of_u.are_bf16() && of_v.are_bf16())
        parts_ = 1;
      else if (split && of_u.fit_in_parts() && of_v.fit_in_parts())
        parts_ = kParts, u_scale_ = of_u.scale(), v_scale_ = of_v.scale();
      else
        return;
      kernels_ = kernels;
      // a product may begin at any row and reads a whole block from there
      n_ = padded_to(kTileBlock, n) + kTileBlock, m_ = padded_to(kTileBlock, m) + kTileBlock;
      depth_ = padded_to(kTileDepth, d);
      fill_rows(u, n), fill_columns(v, m);
      fill_pairs(v_pairs_, v, v_scale_, m, m_);
      if (!one_set) fill_pairs(u_pairs_, u, u_scale_, n, n_);
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
      kernels_->product({s + j, ld, rows_.get() + i0 * depth_, depth_, n_ * depth_, columns_.get() + (j0 + j) * depth_,
                         kTileRows * depth_, m_ * depth_, parts_ == 1 ? kWhole : kSymmetric, needed, width, d_,
                         static_cast<float>(scale * u_scale_ * v_scale_), /*accumulate=*/false});
    }
  }

  // The vectors, divided by `scale`, as the right side of a product with weights: panels of kTileRows features.
  struct Pairs {
    const uint16_t* data;
    int64_t panel, part;
    float scale;
    const uint16_t* at(int64_t vector) const { return data + vector * kTileRows; }
  };
  Pairs u_pairs() const { return one_set_ ? v_pairs() : Pairs{u_pairs_.get(), n_ * kTileRows, n_ * depth_, u_scale_}; }
  Pairs v_pairs() const { return {v_pairs_.get(), m_ * kTileRows, m_ * depth_, v_scale_}; }
  Bf16Terms terms_with_weights() const { return parts_ == 1 ? kOfWeight : kOfBoth; }

 private:
  // What is to be known of the numbers of one side, as bits of float32.
  struct Numbers {
    uint32_t lower_halves = 0;                 // of all, together
    uint32_t largest = 0, smallest_row = ~0u;  // magnitudes; of the row whose largest is the smallest but zero

    static uint32_t power_of_two(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }

    // The largest is such that no product with parts of weights is flushed to zero or overflows where it matters. NaN
    // and infinities are left to the widened path.
    bool are_bf16() const { return lower_halves == 0 && largest >= power_of_two(-16) && largest <= power_of_two(30); }
    // Divided by `scale` the largest is between 1 and 2, and of no row is a part or product flushed that matters.
    bool fit_in_parts() const {
      return largest >= power_of_two(-50) && largest <= power_of_two(50) &&
             largest - smallest_row <= power_of_two(48) - power_of_two(0);
    }
    float scale() const { return as_float(largest & 0x7f800000u); }

    void add(const Numbers& x) {
      lower_halves |= x.lower_halves;
      largest = std::max(largest, x.largest), smallest_row = std::min(smallest_row, x.smallest_row);
    }
  };

  static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
  }
  static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  }

  static uint32_t lower_halves(const float* x, int64_t size) {
    uint32_t lower = 0;
    for (int64_t i = 0; i < size; ++i) lower |= bits_of(x[i]);
    return lower & 0xffffu;
  }

  static Numbers look_at(const float* x, int64_t count, int64_t d) {
    Numbers all;
    std::mutex mutex;
    torch::stable::parallel_for(0, count, 1 + (1 << 16) / d, [&](int64_t begin, int64_t end) {
      Numbers here;
      for (int64_t i = begin; i < end; ++i) {
        uint32_t largest = 0;
        for (int64_t k = 0; k < d; ++k) largest = std::max(largest, bits_of(x[i * d + k]) & 0x7fffffffu);
        here.add({lower_halves(x + i * d, d), largest, largest == 0 ? ~0u : largest});
      }
      const std::lock_guard<std::mutex> lock(mutex);
      all.add(here);
    });
    return all;
  }

  static Workspace<uint16_t> zeros(int64_t size) {
    Workspace<uint16_t> out(size);
    std::fill(out.get(), out.get() + size, uint16_t{0});
    return out;
  }

  // Calls place(vector, part, its d_ numbers) for all of x / scale, shared out to threads.
  template <class Place>
  void lay_out(const float* x, float scale, int64_t count, const Place& place) const {
    torch::stable::parallel_for(0, count, 1 + (1 << 15) / d_, [&](int64_t begin, int64_t end) {
      const Workspace<uint16_t> numbers(kParts * d_);
      for (int64_t i = begin; i < end; ++i) {
        kernels_->cut(x + i * d_, d_, 1.0f / scale, numbers.get());
        for (int64_t part = 0; part < parts_; ++part) place(i, part, numbers.get() + part * d_);
      }
    });
  }

  // Row by row.
  void fill_rows(const float* x, int64_t count) {
    rows_ = zeros(parts_ * n_ * depth_);
    lay_out(x, u_scale_, count, [&](int64_t i, int64_t part, const uint16_t* numbers) {
      std::copy(numbers, numbers + d_, rows_.get() + (part * n_ + i) * depth_);
    });
  }

  // Panels of kTileRows vectors, two features side by side.
  void fill_columns(const float* x, int64_t count) {
    columns_ = zeros(parts_ * m_ * depth_);
    lay_out(x, v_scale_, count, [&](int64_t j, int64_t part, const uint16_t* numbers) {
      uint16_t* column = columns_.get() + (part * m_ + j / kTileRows * kTileRows) * depth_ + 2 * (j % kTileRows);
      for (int64_t k = 0; k < d_; ++k) column[k / 2 * 2 * kTileRows + k % 2] = numbers[k];
    });
  }

  // Panels of kTileRows features, two vectors side by side.
  void fill_pairs(Workspace<uint16_t>& out, const float* x, float scale, int64_t count, int64_t padded) const {
    out = zeros(parts_ * padded * depth_);
    lay_out(x, scale, count, [&](int64_t j, int64_t part, const uint16_t* numbers) {
      uint16_t* pair = out.get() + part * padded * depth_ + j / 2 * 2 * kTileRows + j % 2;
      for (int64_t k = 0; k < d_; ++k) pair[k / kTileRows * kTileRows * padded + 2 * (k % kTileRows)] = numbers[k];
    });
  }

  int64_t d_, n_ = 0, m_ = 0, depth_ = 0;  // n_, m_, depth_: padded
  bool one_set_ = false;
  int64_t parts_ = 0;                      // of every number
  float u_scale_ = 1.0f, v_scale_ = 1.0f;  // powers of two
  const Bf16Kernels* kernels_ = nullptr;
  Workspace<uint16_t> rows_, columns_, v_pairs_, u_pairs_;
};

// Products of a tile's weights with such operands; one per thread. Weights are cut kTileBlock rows at a time.
class Bf16Combiner {
 public:
  Bf16Combiner(const Bf16Operands& operands, int64_t block_rows, int64_t tile_cols) : operands_(operands) {
    if (!operands) return;
    const int64_t depth = padded_to(kTileDepth, std::max(block_rows, tile_cols));
    parts_ = Workspace<uint16_t>(kParts * kTileBlock * depth);
    turned_ = Workspace<float>(kTileBlock * padded_to(kTileDepth, block_rows));
  }
  explicit operator bool() const { return static_cast<bool>(operands_); }

  // out[rows, d] (+)= w v for rows <= kTileBlock weights of columns [j0, j0 + cols), j0 even. False, and nothing done,
  // where a weight is not finite or all are too small.
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
    scale *= vectors.scale;
    if (!std::isnormal(scale)) return false;
    operands_.kernels().product({out, operands_.d(), parts_.get(), parts_row, kTileBlock * parts_row, vectors.at(first),
                                 vectors.panel, vectors.part, operands_.terms_with_weights(), rows, operands_.d(),
                                 depth, scale, accumulate});
    return true;
  }

  const Bf16Operands& operands_;
  Workspace<uint16_t> parts_;
  Workspace<float> turned_;
};

}  // namespace contrastive_ext
