// The tile products, and columns laid out for them once a call.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "bf16_operands.h"
#include "library_product.h"
#include "tile.h"
#include "workspace.h"

namespace contrastive_ext {

// Vectors [m, d] as columns: panels of kPanel of them, feature by feature, 0 beyond the last.
template <class T>
class Panels {
 public:
  Panels() = default;
  Panels(const T* data, int64_t m, int64_t d) : d_(d), copy_(padded_to(kPanel, m) * d) {
    torch::stable::parallel_for(0, padded_to(kPanel, m) / kPanel, 1 + (1 << 16) / (kPanel * d + 1),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t panel = begin; panel < end; ++panel) fill(panel * kPanel, data, m);
                                });
  }
  const T* at(int64_t j) const { return copy_.get() + j / kPanel * kPanel * d_ + j % kPanel; }

 private:
  void fill(int64_t first, const T* data, int64_t m) {
    T* panel = copy_.get() + first * d_;
    const int64_t count = std::min(kPanel, m - first);
    if (count < kPanel) std::fill(panel, panel + kPanel * d_, T(0));
    tile_kernels<T>().transpose(panel, kPanel, data + first * d_, d_, count, d_);
  }

  int64_t d_ = 0;
  Workspace<T> copy_;
};

// In a tile that meets the diagonal of one set the products leave out what lies below it, to this many rows and
// columns.
constexpr int64_t kDiagonalStep = 32;

// Logits: s[rows, cols] = scale u[rows, d] v^T, of v from column j0 on. Padding columns, and with `above_diagonal` what
// lies below it (row 0 is column j0 - `offset`), hold anything.
template <class T>
inline void score_tile(T* s, int64_t ld, double scale, const T* u, int64_t rows, const Panels<T>& v, int64_t j0,
                       int64_t cols, int64_t d, bool above_diagonal = false, int64_t offset = 0) {
  for (int64_t j = 0; j < cols;) {
    int64_t width = std::min(kPanel - (j0 + j) % kPanel, cols - j), needed = rows;
    if (above_diagonal && offset + j < rows) {
      width = std::min(width, kDiagonalStep);
      needed = std::min(rows, offset + j + width);
    }
    multiply<T>({s + j, ld, u, d, 1, v.at(j0 + j), kPanel, needed, padded_to(kVectorPad, width), d,
                 static_cast<T>(scale), /*accumulate=*/false});
    j += width;
  }
}

static_assert(kDiagonalStep == kTileBlock, "what the diagonal leaves out is whole blocks of tile registers");

// out[rows, d] (+)= w v for weights w in the tile's layout, v[cols, d] the tile's columns
template <class T>
inline void combine_columns(T* out, const T* w, const Tile<T>& tile, const T* v, int64_t d, bool accumulate,
                            const Bf16Combiner& bf16) {
  const int64_t step = tile.upper || bf16 ? kDiagonalStep : tile.rows;
  for (int64_t i = 0; i < tile.rows; i += step) {
    const int64_t rows = std::min(step, tile.rows - i);
    const int64_t zeros = tile.upper ? std::min(tile.cols, std::max<int64_t>(0, tile.i0 + i - tile.j0)) : 0;
    const T* weights = w + i * tile.ld + zeros;
    const int64_t cols = tile.cols - zeros;
    if constexpr (std::is_same_v<T, float>)
      if (bf16 && bf16.weigh_columns(out + i * d, weights, tile.ld, rows, tile.j0 + zeros, cols, accumulate)) continue;
    multiply<T>({out + i * d, d, weights, tile.ld, 1, v + zeros * d, d, rows, d, cols, T(1), accumulate});
  }
}

// Columns of wide tiles at a time in products with w^T, which read them twice and more.
constexpr int64_t kTurnedColumns = 512;

// out[cols, d] (+)= w^T u for the tile's weights w, u[rows, d] the tile's rows
template <class T>
inline void combine_rows(T* out, const Tile<T>& tile, const T* u, int64_t d, bool accumulate,
                         const Bf16Combiner& bf16) {
  for (int64_t j = 0, cols; j < tile.cols; j += cols) {
    const int64_t last = tile.j0 + j + kDiagonalStep - tile.i0;  // rows from here on are below the diagonal
    const bool cut = tile.upper && last < tile.rows;
    cols = std::min(cut || bf16 ? kDiagonalStep : kTurnedColumns, tile.cols - j);
    const int64_t rows = cut ? last : tile.rows;
    if constexpr (std::is_same_v<T, float>)
      if (bf16 && bf16.weigh_rows(out + j * d, tile.s + j, tile.ld, cols, tile.i0, rows, accumulate)) continue;
    multiply<T>({out + j * d, d, tile.s + j, 1, tile.ld, u, d, cols, d, rows, T(1), accumulate});
  }
}

}  // namespace contrastive_ext
