// A problem as operators are asked it: flat arguments made one piece, checked, turned into what kernels take.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../compat.h"
#include "pair_tables.h"
#include "row_stats.h"
#include "tensors.h"

namespace contrastive_ext {

// The arguments that describe a problem, in the order of every operator (csrc/operators.cpp).
struct Request {
  const Tensor& u;
  const MaybeTensor& v;
  double scale;
  const std::vector<double>& exponents;
  int64_t num_images, positive_offset;
  bool only_equal_ids;
  const MaybeTensor &row_ids, &col_ids, &ignored;
  const MaybeTensor &gate_scorers, &gate_features, &gate_row_limit, &gate_col_limit;
  bool unit, split_products;

  int64_t n() const { return u.size(0); }
  int64_t m() const { return v ? v->size(0) : u.size(0); }
  int64_t k() const { return static_cast<int64_t>(exponents.size()); }

  void check() const {
    STD_TORCH_CHECK(u.dim() == 2 && (!v || v->dim() == 2), "u and v must be matrices [N, D] and [M, D].");
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "u must be float32 or float64.");
    STD_TORCH_CHECK(!split_products || (dtype == ScalarType::Float && chosen_bf16().kernels),
                    "products of float32 numbers in bf16 parts need AMX: ", chosen_bf16().reason, ".");
    check_tensor(u, "u", dtype, {n(), u.size(1)});
    if (v) check_tensor(*v, "v", dtype, {m(), u.size(1)});
    if (row_ids) check_tensor(*row_ids, "row_ids", ScalarType::Long, {n()});
    if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, {m()});
    STD_TORCH_CHECK(v || !col_ids, "one set takes row_ids only; they serve both sides.");
    check_scale(scale);
    check_number_of_exponents(k());
    for (double beta : exponents) STD_TORCH_CHECK(beta > 0.0, "exponents must be positive; got ", beta, ".");
    STD_TORCH_CHECK(num_images >= 0 && positive_offset >= 0, "num_images and positive_offset must not be negative.");
    STD_TORCH_CHECK(num_images == 0 || positive_offset + n() <= m(), "positive_offset + N must be at most M; got ",
                    positive_offset, " + ", n(), " > ", m(), ".");
    if (ignored) {
      STD_TORCH_CHECK(ignored->dim() == 2 && n() % std::max<int64_t>(1, ignored->size(0)) == 0,
                      "ignored must be [G, k], G a divisor of N.");
      check_tensor(*ignored, "ignored", ScalarType::Long, {ignored->size(0), ignored->size(1)});
    }
    if (gate_scorers) check_gate();
  }

  void check_gate() const {
    const Tensor& scorers = *gate_scorers;
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(scorers.dim() == 3 && scorers.size(0) > 0 && n() % std::max<int64_t>(1, scorers.size(1)) == 0,
                    "gate_scorers must be [S, G, E], G a divisor of N.");
    check_tensor(scorers, "gate_scorers", dtype, {scorers.size(0), scorers.size(1), scorers.size(2)});
    STD_TORCH_CHECK(gate_features && gate_row_limit && (v || gate_col_limit),
                    "a gate has scorers, features, row_limit and, with one set, col_limit.");
    check_tensor(*gate_features, "gate_features", dtype, {m(), scorers.size(2)});
    check_tensor(*gate_row_limit, "gate_row_limit", dtype, {n()});
    if (gate_col_limit) check_tensor(*gate_col_limit, "gate_col_limit", dtype, {m()});
  }

  PairInputs pairs() const {
    const int64_t* rows = data<int64_t>(row_ids);
    return {n(),
            m(),
            num_images,
            positive_offset,
            only_equal_ids,
            rows,
            v ? data<int64_t>(col_ids) : rows,
            data<int64_t>(ignored),
            ignored ? ignored->size(0) : 0,
            ignored ? ignored->size(1) : 0,
            /*one_set=*/!v};
  }

  // Calls body(zero, problem), zero of the type that computes.
  template <class Body>
  void compute(const Body& body) const {
    const PairTables tables(pairs());
    for_float_or_double(u.scalar_type(), [&](auto zero) { body(zero, problem<decltype(zero)>(tables)); });
  }

  // `tables` must outlive it.
  template <class T>
  Problem<T> problem(const PairTables& tables) const {
    Problem<T> p{data<T>(u), v ? data<T>(*v) : data<T>(u),
                 n(),        m(),
                 u.size(1),  /*one_set=*/!v,
                 unit,       scale,
                 exponents,  tables.rules(),
                 {},         split_products};
    for (double& beta : p.exponents)
      beta = static_cast<double>(static_cast<T>(beta));  // as the dense formula rounds it
    if (!gate_scorers) return p;
    p.gate.scorers = {data<T>(*gate_scorers),
                      gate_scorers->size(0),
                      gate_scorers->size(1),
                      gate_scorers->size(2),
                      {data<T>(*gate_features), m(), gate_scorers->size(2)}};
    p.gate.row_limit = data<T>(*gate_row_limit);
    if (gate_col_limit) {
      p.gate.col_limit.assign(data<T>(*gate_col_limit), data<T>(*gate_col_limit) + m());
      p.gate.col_limit.resize(static_cast<size_t>(m() + kColumnPad));
    }
    return p;
  }
};

// Two results of a gradient: du [n, d] and dv [m, d], empty where they are not needed.
struct Gradients {
  Tensor du, dv;
  bool need_u, need_v;

  Gradients(const Request& request, bool need_u, bool need_v)
      : du(empty_unless(need_u, request.u, request.n())),
        dv(empty_unless(need_v, request.u, request.m())),
        need_u(need_u),
        need_v(need_v) {
    STD_TORCH_CHECK(request.v || !need_v, "one set has one gradient, du.");
  }
  std::tuple<Tensor, Tensor> results() const { return {du, dv}; }

 private:
  static Tensor empty_unless(bool needed, const Tensor& u, int64_t rows) {
    return needed ? empty(u, {rows, u.size(1)}) : empty(u, {0});
  }
};

// The flat function that torch calls, of one that takes a checked Request and then its own arguments:
// TORCH_BOX(&Flat<&function>::call).
template <auto kFunction>
struct Flat;

template <class Results, class... Own, Results (*kFunction)(const Request&, Own...)>
struct Flat<kFunction> {
  static Results call(const Tensor& u, MaybeTensor v, double scale, std::vector<double> exponents, int64_t num_images,
                      int64_t positive_offset, bool only_equal_ids, MaybeTensor row_ids, MaybeTensor col_ids,
                      MaybeTensor ignored, MaybeTensor gate_scorers, MaybeTensor gate_features,
                      MaybeTensor gate_row_limit, MaybeTensor gate_col_limit, bool unit, bool split_products,
                      Own... own) {
    const Request request{
        u,       v,       scale,        exponents,     num_images,     positive_offset, only_equal_ids, row_ids,
        col_ids, ignored, gate_scorers, gate_features, gate_row_limit, gate_col_limit,  unit,           split_products};
    request.check();
    return kFunction(request, static_cast<Own&&>(own)...);
  }
};

}  // namespace contrastive_ext
