// What the forward decides once per call: which exponentials to make, with which shift, and the state they add up to.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../online_lse.h"
#include "row_stats.h"

namespace contrastive_ext {

// One sweep of exponentials over a tile: a stream (one lse) and, where its double is wanted too, a second by squaring.
struct Pass {
  int stream, square_stream;  // -1: none
  double beta;
  double shift2;  // static shift, an integer power of two
};

struct Plan {
  int num_streams = 0;  // exponents, then twice the first for the diagnostics unless it is among them
  int diagnostic_stream = -1;
  bool is_static = false;
  bool needs_moments = false;
  std::vector<Pass> passes;
};

// Moves the terms of unit rows, which span 2^(2 reach), into the exponent range; false where they do not fit.
template <class T>
inline bool choose_static_shift(Pass& pass, double reach) {
  using Range = ExponentRange<T>;
  const double times = pass.square_stream >= 0 ? 2.0 : 1.0;
  const double offset = std::max(0.0, std::ceil(2.0 * reach + Range::kLowest / times));
  pass.shift2 = std::floor(reach - offset);
  return offset * times <= Range::kHighest;
}

template <class T>
Plan make_plan(const Problem<T>& problem, bool diagnostics, bool maximum) {
  Plan plan;
  std::vector<double> beta = problem.exponents;
  if (diagnostics) {
    const double doubled = 2.0 * beta[0];
    const auto found = std::find(beta.begin(), beta.end(), doubled);
    plan.diagnostic_stream = static_cast<int>(found - beta.begin());
    if (found == beta.end()) beta.push_back(doubled);
  }
  plan.num_streams = static_cast<int>(beta.size());
  std::vector<bool> done(beta.size(), false);
  const auto is_square = [&](size_t a, size_t b) { return !done[b] && b != a && beta[b] == 2.0 * beta[a]; };
  for (size_t round = 0; round < beta.size(); ++round) {  // smallest exponent first, so that squares are found
    size_t base = beta.size();
    for (size_t k = 0; k < beta.size(); ++k)
      if (!done[k] && (base == beta.size() || beta[k] < beta[base])) base = k;
    if (base == beta.size()) break;
    Pass pass{static_cast<int>(base), -1, beta[base], 0.0};
    done[base] = true;
    for (size_t k = 0; k < beta.size() && pass.square_stream < 0; ++k)
      if (is_square(base, k)) pass.square_stream = static_cast<int>(k), done[k] = true;
    plan.passes.push_back(pass);
  }
  plan.is_static = problem.unit;
  for (Pass& pass : plan.passes)
    plan.is_static = choose_static_shift<T>(pass, problem.reach(pass.beta)) && plan.is_static;
  plan.needs_moments = diagnostics || maximum || !plan.is_static;
  return plan;
}

// What the sweep leaves for one side's anchors.
template <class T>
struct AnchorState {
  std::vector<OnlineLse<double>> lse;  // [streams, anchors]; double: partial sums of thousands of tiles meet here
  std::vector<int64_t> count;          // negatives
  std::vector<T> max;                  // maximum, diagnostics
  std::vector<double> sum;
  int64_t anchors;

  AnchorState(const Plan& plan, int64_t anchors, bool moments)
      : lse(static_cast<size_t>(plan.num_streams * anchors)),
        count(static_cast<size_t>(anchors)),
        max(moments ? anchors : 0, -INFINITY),
        sum(moments ? anchors : 0),
        anchors(anchors) {
    if (!plan.is_static) return;
    for (const Pass& pass : plan.passes) {
      set_shift(pass.stream, kLn2 * pass.shift2);
      if (pass.square_stream >= 0) set_shift(pass.square_stream, 2.0 * kLn2 * pass.shift2);
    }
  }
  OnlineLse<double>* stream(int k) { return lse.data() + k * anchors; }
  bool moments() const { return !max.empty(); }
  void add_moments(int64_t at, T other_max, double other_sum) {
    if (other_max > max[at]) max[at] = other_max;
    sum[at] += other_sum;
  }

 private:
  void set_shift(int k, double shift) {
    for (int64_t i = 0; i < anchors; ++i) stream(k)[i].shift = shift;
  }
};

}  // namespace contrastive_ext
