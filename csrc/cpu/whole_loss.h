// A built-in loss over one set of candidates, from z1 and z2 to the loss and back, in one call each way: prologue,
// sweep of row_stats, row losses, reduction. A small batch costs more in crossings between Python and C++ than in
// arithmetic.
#pragma once

#include "../row_losses.h"
#include "prologue.h"
#include "row_stats_backward.h"
#include "row_stats_forward.h"

namespace contrastive_ext {

enum class Reduction { kMean, kSum, kNone };

// z1 [b, d], z2 [m, d]; m = b but for one_way. Operands [b + m, d] are the rows of z1, then those of z2.
//   two_view   anchors: all operands against themselves
//   one_way    anchors z1 against z2
//   symmetric  anchors z1 and, as columns of the same sweep, z2: two sides
struct WholeLoss {
  bool two_view, symmetric, normalize;
  int64_t b, m, d;
  double scale;
  std::vector<double> exponents;
  Reduction reduction;

  int64_t anchors() const { return two_view ? 2 * b : b; }  // of one side
  int64_t sides() const { return symmetric ? 2 : 1; }
  int64_t k() const { return static_cast<int64_t>(exponents.size()); }
  // The image of an anchor, and with it its positive.
  int64_t image(int64_t anchor) const { return anchor < b ? anchor : anchor - b; }

  template <class T>
  Problem<T> problem(const T* operands) const {
    Problem<T> p{operands,
                 two_view ? operands : operands + b * d,
                 anchors(),
                 two_view ? 2 * b : m,
                 d,
                 two_view,
                 /*unit=*/normalize,
                 scale,
                 exponents,
                 {},
                 {}};
    for (double& beta : p.exponents) beta = static_cast<double>(static_cast<T>(beta));
    p.pairs.num_rows = anchors(), p.pairs.num_images = b;
    return p;
  }
};

// What the forward leaves for the backward. Coefficients are those of every row's own loss, before the reduction.
template <class T>
struct WholeLossState {
  T* operands;      // [b + m, d]
  T* norm;          // [b + m]; not written without normalisation
  T* lse;           // [sides, K, anchors]
  T* coefficients;  // [sides, K + 2, anchors]: dL/dlse_k, dL/dpos, dL/dscale
};

// loss [] or [sides * anchors]; clamped []: the share of rows on the debiasing floor.
template <class T, class In>
void whole_loss_forward(const WholeLoss& whole, const RowLossParameters<T>& parameters, const In* z1, const In* z2,
                        const WholeLossState<T>& state, T* loss, T* clamped);

// dz1 [b, d], dz2 [m, d]; dscale [] or null.
template <class T, class In>
void whole_loss_backward(const WholeLoss& whole, const In* z1, const In* z2, const WholeLossState<T>& state,
                         const T* grad_loss, In* dz1, In* dz2, T* dscale);

}  // namespace contrastive_ext
