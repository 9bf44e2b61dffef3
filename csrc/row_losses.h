// The built-in row losses: statistics of one row in, loss and derivatives out. The formulas of `from_stats` in
// contrastive_ext/losses, which explain them; triton_kernels/row_losses.py is the same for Triton.
//
// All are a function of lse_k, pos, count and scale: infonce softplus(S - pos) and decoupled S - pos with S = lse;
// debiased softplus(log Ng - pos), S = lse; hard_negative the same with S = log count + lse_1 - lse_0.
#pragma once

#include <cmath>

#include "host_device.h"

namespace contrastive_ext {

enum class Formula { kInfoNCE, kDecoupled, kDebiased, kHardNegative };

template <class T>
struct RowLossParameters {
  Formula formula;
  T log_tau_plus;   // -inf: nothing to correct
  T one_minus_tau;  // from double precision: tau_plus may round to 1
  // dS/dlse_k: (1) or, with two exponents, (-1, 1); with weights held constant (0, 1 / (1 + beta)).
  T sum_by_lse[2];
};

template <class T>
struct RowLossResult {
  T loss;
  T by_lse[2];  // dL/dlse_k
  T by_pos;     // dL/dpos
  T by_scale;   // dL/dscale at constant lse and pos: the debiasing floor depends on it
  bool clamped;
};

// {name, tau_plus, beta, detach_weights} as Python hands them over; `parameters` may be shorter. False: no such name.
template <class T, class Name>
inline bool make_parameters(const Name& name, const double* parameters, size_t count, RowLossParameters<T>* out) {
  const double tau_plus = count > 0 ? parameters[0] : 0.0, beta = count > 1 ? parameters[1] : 0.0;
  const bool detach = count > 2 && parameters[2] != 0.0;
  out->log_tau_plus = static_cast<T>(std::log(tau_plus));
  out->one_minus_tau = static_cast<T>(1.0 - tau_plus);
  out->sum_by_lse[0] = T(1), out->sum_by_lse[1] = T(0);
  if (name == "infonce") return out->formula = Formula::kInfoNCE, true;
  if (name == "decoupled") return out->formula = Formula::kDecoupled, true;
  if (name == "debiased") return out->formula = Formula::kDebiased, true;
  if (name != "hard_negative") return false;
  out->formula = Formula::kHardNegative;
  out->sum_by_lse[0] = detach ? T(0) : T(-1);
  out->sum_by_lse[1] = detach ? static_cast<T>(1.0 / (1.0 + beta)) : T(1);
  return true;
}

// log Ng of the debiased negatives and its derivatives; `clamped` where the floor count e^-scale replaced them.
template <class T>
struct DebiasedSum {
  T log, by_sum, by_pos, by_scale;
  bool clamped;
};

template <class T>
CE_HOST_DEVICE DebiasedSum<T> debias(const RowLossParameters<T>& parameters, T log_sum, T pos, T log_count, T scale) {
  using std::exp;
  using std::log;
  constexpr T kOverwhelmed = 60;  // e^60 times the sum itself: far below the floor, and finite in float32
  const T log_floor = log_count - scale;
  const T shift = log_sum > log_floor ? log_sum : log_floor;
  const T sum = exp(log_sum - shift);
  T hidden = 0, raw = sum;
  if (parameters.log_tau_plus > -INFINITY) {
    const T exponent = pos + log_count + parameters.log_tau_plus - shift;
    hidden = exp(exponent > kOverwhelmed ? kOverwhelmed : exponent);
    raw = (sum - hidden) / parameters.one_minus_tau;
  }
  // written so that NaN is not "clamped": it must reach the loss
  if (raw < exp(log_floor - shift) || raw <= 0) return {log_floor, 0, 0, -1, true};
  const T inverse = T(1) / (parameters.one_minus_tau * raw);
  return {shift + log(raw), sum * inverse, -hidden * inverse, 0, false};
}

// The loss of a row with at least one negative.
template <class T>
CE_HOST_DEVICE RowLossResult<T> row_loss(const RowLossParameters<T>& parameters, T lse_0, T lse_1, T pos, T count,
                                         T scale) {
  using std::exp;
  using std::fabs;
  using std::log;
  using std::log1p;
  const T first = parameters.sum_by_lse[0], second = parameters.sum_by_lse[1];
  if (parameters.formula == Formula::kDecoupled) return {lse_0 - pos, {1, 0}, -1, 0, false};
  const bool debiased = parameters.formula != Formula::kInfoNCE;
  const T log_count = debiased ? log(count) : T(0);
  const T log_sum = parameters.formula == Formula::kHardNegative ? log_count + lse_1 - lse_0 : lse_0;
  DebiasedSum<T> negatives{log_sum, 1, 0, 0, false};
  if (debiased) negatives = debias(parameters, log_sum, pos, log_count, scale);
  const T gap = negatives.log - pos;
  const T small = exp(-fabs(gap));  // softplus and its derivative, exact on both tails
  const T loss = log1p(small) + (gap > 0 ? gap : T(0));
  const T pull = (gap > 0 ? T(1) : small) / (T(1) + small);
  return {gap == gap ? loss : gap,
          {pull * negatives.by_sum * first, pull * negatives.by_sum * second},
          pull * (negatives.by_pos - T(1)),
          pull * negatives.by_scale,
          negatives.clamped};
}

}  // namespace contrastive_ext
