// Forward and backward of a whole loss: what surrounds the sweeps is linear in the rows, in a fixed order, and only the
// passes over [rows, d] are shared out to threads.
#include "whole_loss.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace contrastive_ext {

template <class T, class In>
void whole_loss_forward(const WholeLoss& whole, const RowLossParameters<T>& parameters, const In* z1, const In* z2,
                        const WholeLossState<T>& state, T* loss, T* clamped) {
  const int64_t b = whole.b, m = whole.m, d = whole.d, n = whole.anchors(), k = whole.k();
  for_each_row(b + m, d, [&](int64_t r) {
    prepare_row<T, In>(r < b ? z1 + r * d : z2 + (r - b) * d, d, state.operands + r * d,
                       whole.normalize ? state.norm + r : nullptr);
  });
  std::vector<T> pos(static_cast<size_t>(b)), count(static_cast<size_t>(n * whole.sides()));
  for_each_row(b, d, [&](int64_t i) {
    pos[i] = static_cast<T>(whole.scale) * dot(state.operands + i * d, state.operands + (b + i) * d, d);
  });

  ForwardResults<T> results{state.lse, count.data(),          nullptr,          nullptr,
                            nullptr,   /*diagnostics=*/false, /*maximum=*/false};
  if (whole.symmetric) results.col_lse = state.lse + k * n, results.col_aux = count.data() + n;
  row_stats_forward<T>(whole.problem(state.operands), results);

  double total = 0.0;
  int64_t num_clamped = 0;
  for (int64_t side = 0; side < whole.sides(); ++side) {
    const T* lse = state.lse + side * k * n;
    T* coefficients = state.coefficients + side * (k + 2) * n;
    for (int64_t i = 0; i < n; ++i) {
      const T positive = pos[whole.image(i)];
      // no negatives: 0, or NaN if the positive is not finite
      RowLossResult<T> row{T(0) * positive, {0, 0}, 0, 0, false};
      if (count[side * n + i] > 0)
        row = row_loss(parameters, lse[i], k > 1 ? lse[n + i] : T(0), positive, count[side * n + i],
                       static_cast<T>(whole.scale));
      for (int64_t j = 0; j < k; ++j) coefficients[j * n + i] = row.by_lse[j];
      coefficients[k * n + i] = row.by_pos, coefficients[(k + 1) * n + i] = row.by_scale;
      num_clamped += row.clamped;
      total += static_cast<double>(row.loss);
      if (whole.reduction == Reduction::kNone) loss[side * n + i] = row.loss;
    }
  }
  const double rows = static_cast<double>(n * whole.sides());
  if (whole.reduction != Reduction::kNone)
    *loss = static_cast<T>(whole.reduction == Reduction::kMean ? total / rows : total);
  *clamped = static_cast<T>(static_cast<double>(num_clamped) / rows);
}

template <class T, class In>
void whole_loss_backward(const WholeLoss& whole, const In* z1, const In* z2, const WholeLossState<T>& state,
                         const T* grad_loss, In* dz1, In* dz2, T* dscale) {
  const int64_t b = whole.b, m = whole.m, d = whole.d, n = whole.anchors(), k = whole.k(), sides = whole.sides();
  const T shared = whole.reduction == Reduction::kMean ? *grad_loss / static_cast<T>(n * sides) : *grad_loss;
  std::vector<T> grad_lse(static_cast<size_t>(sides * k * n)), by_cosine(static_cast<size_t>(b));
  double scale_direct = 0.0;
  for (int64_t side = 0; side < sides; ++side) {
    const T* coefficients = state.coefficients + side * (k + 2) * n;
    for (int64_t i = 0; i < n; ++i) {
      const T upstream = whole.reduction == Reduction::kNone ? grad_loss[side * n + i] : shared;
      for (int64_t j = 0; j < k; ++j) grad_lse[(side * k + j) * n + i] = upstream * coefficients[j * n + i];
      by_cosine[whole.image(i)] += upstream * coefficients[k * n + i];
      scale_direct += static_cast<double>(upstream * coefficients[(k + 1) * n + i]);
    }
  }

  const Workspace<T> gradients((b + m) * d);
  T *du = gradients.get(), *dv = whole.two_view ? nullptr : du + b * d;
  const T* column_lse = whole.symmetric ? state.lse + k * n : nullptr;
  const T* column_grad = whole.symmetric ? grad_lse.data() + k * n : nullptr;
  row_stats_backward<T>(whole.problem(state.operands), {state.lse, grad_lse.data(), column_lse, column_grad}, du, dv);

  if (dscale) {
    double swept = 0.0, positive = 0.0;
    for (int64_t i = 0; i < n; ++i) swept += static_cast<double>(dot(state.operands + i * d, du + i * d, d));
    for (int64_t i = 0; i < b; ++i)
      positive += static_cast<double>(by_cosine[i] * dot(state.operands + i * d, state.operands + (b + i) * d, d));
    *dscale = static_cast<T>(scale_direct + positive + swept / (whole.two_view ? 2.0 * whole.scale : whole.scale));
  }
  for_each_row(b + m, d, [&](int64_t r) {
    const int64_t image = whole.image(r);
    const T* partner = image < b ? state.operands + (r < b ? b + r : image) * d : nullptr;
    row_gradient<T, In>(r < b ? z1 + r * d : z2 + (r - b) * d, whole.normalize ? state.norm + r : nullptr, partner,
                        partner ? static_cast<T>(whole.scale) * by_cosine[image] : T(0), d, du + r * d,
                        r < b ? dz1 + r * d : dz2 + (r - b) * d);
  });
}

using c10::BFloat16;
using c10::Half;
#define CE_INSTANTIATE(T, In)                                                                                          \
  template void whole_loss_forward<T, In>(const WholeLoss&, const RowLossParameters<T>&, const In*, const In*,         \
                                          const WholeLossState<T>&, T*, T*);                                           \
  template void whole_loss_backward<T, In>(const WholeLoss&, const In*, const In*, const WholeLossState<T>&, const T*, \
                                           In*, In*, T*);
CE_INSTANTIATE(float, float)
CE_INSTANTIATE(double, double)
CE_INSTANTIATE(float, Half)
CE_INSTANTIATE(float, BFloat16)

}  // namespace contrastive_ext
