// The operators: schema, checks, allocation. Python owns autograd, the kernels own the mathematics.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../compat.h"
#include "pair_tables.h"
#include "ranked_stats.h"
#include "row_stats_backward.h"
#include "row_stats_forward.h"
#include "tensors.h"
#include "top_columns.h"

namespace contrastive_ext {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The operands both directions share, checked.
struct Request {
  const Tensor& u;
  const MaybeTensor& v;
  double scale;
  const std::vector<double>& exponents;
  int64_t num_images, positive_offset;
  bool only_equal_ids;
  const MaybeTensor &row_ids, &col_ids, &ignored;
  const MaybeTensor &gate_scorers, &gate_features, &gate_row_limit, &gate_col_limit;
  bool unit;

  int64_t n() const { return u.size(0); }
  int64_t m() const { return v ? v->size(0) : u.size(0); }
  int64_t k() const { return static_cast<int64_t>(exponents.size()); }

  void check() const {
    STD_TORCH_CHECK(u.dim() == 2 && (!v || v->dim() == 2), "u and v must be matrices [N, D] and [M, D].");
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "u must be float32 or float64.");
    check_tensor(u, "u", dtype, {n(), u.size(1)});
    if (v) check_tensor(*v, "v", dtype, {m(), u.size(1)});
    if (row_ids) check_tensor(*row_ids, "row_ids", ScalarType::Long, {n()});
    if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, {m()});
    STD_TORCH_CHECK(v || !col_ids, "one set takes row_ids only; they serve both sides.");
    STD_TORCH_CHECK(!(scale <= 0.0), "scale must be positive; got ", scale, ".");
    STD_TORCH_CHECK(k() == 1 || k() == 2, "exponents must hold 1 or 2 numbers; got ", k(), ".");
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

  // `tables` must outlive it.
  template <class T>
  Problem<T> problem(const PairTables& tables) const {
    Problem<T> p{data<T>(u), v ? data<T>(*v) : data<T>(u),
                 n(),        m(),
                 u.size(1),  /*one_set=*/!v,
                 unit,       scale,
                 exponents,  tables.rules(),
                 {}};
    for (double& beta : p.exponents)
      beta = static_cast<double>(static_cast<T>(beta));  // as the dense formula rounds it
    if (!gate_scorers) return p;
    p.gate.scorers = {data<T>(*gate_scorers), data<T>(*gate_features), gate_scorers->size(0), gate_scorers->size(1),
                      gate_scorers->size(2)};
    p.gate.row_limit = data<T>(*gate_row_limit);
    if (gate_col_limit) {
      p.gate.col_limit.assign(data<T>(*gate_col_limit), data<T>(*gate_col_limit) + m());
      p.gate.col_limit.resize(static_cast<size_t>(m() + kColumnPad));
    }
    return p;
  }
};

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardTuple forward_cpu(const Tensor& u, MaybeTensor v, double scale, std::vector<double> exponents,
                         int64_t num_images, int64_t positive_offset, bool only_equal_ids, MaybeTensor row_ids,
                         MaybeTensor col_ids, MaybeTensor ignored, MaybeTensor gate_scorers, MaybeTensor gate_features,
                         MaybeTensor gate_row_limit, MaybeTensor gate_col_limit, bool unit, bool columns, bool means,
                         bool diagnostics, bool maximum) {
  const Request request{u,       v,       scale,   exponents,    num_images,    positive_offset, only_equal_ids,
                        row_ids, col_ids, ignored, gate_scorers, gate_features, gate_row_limit,  gate_col_limit,
                        unit};
  request.check();
  STD_TORCH_CHECK(v || !columns, "one set has no column statistics of its own: its columns are its rows.");
  const int64_t k = request.k(), n = request.n(), m = request.m(), aux_rows = diagnostics ? 4 : maximum ? 2 : 1;
  const auto nothing = [&] { return empty(u, {0}); };  // its own tensor each time: outputs must not alias
  const Tensor lse = empty(u, {k, n}), aux = empty(u, {aux_rows, n});
  const Tensor col_lse = columns ? empty(u, {k, m}) : nothing(),
               col_aux = columns ? empty(u, {aux_rows, m}) : nothing();
  const Tensor mean = means ? empty(u, {k, n, u.size(1)}) : nothing();
  const PairTables tables(request.pairs());
  for_float_or_double(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    row_stats_forward<T>(request.problem<T>(tables),
                         {data<T>(lse), data<T>(aux), data_if<T>(col_lse, columns), data_if<T>(col_aux, columns),
                          data_if<T>(mean, means), diagnostics, maximum});
  });
  return {lse, aux, col_lse, col_aux, mean};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& u, MaybeTensor v, double scale, std::vector<double> exponents,
                                        int64_t num_images, int64_t positive_offset, bool only_equal_ids,
                                        MaybeTensor row_ids, MaybeTensor col_ids, MaybeTensor ignored,
                                        MaybeTensor gate_scorers, MaybeTensor gate_features, MaybeTensor gate_row_limit,
                                        MaybeTensor gate_col_limit, bool unit, const Tensor& lse,
                                        const Tensor& grad_lse, MaybeTensor col_lse, MaybeTensor grad_col_lse,
                                        bool need_u, bool need_v) {
  const Request request{u,       v,       scale,   exponents,    num_images,    positive_offset, only_equal_ids,
                        row_ids, col_ids, ignored, gate_scorers, gate_features, gate_row_limit,  gate_col_limit,
                        unit};
  request.check();
  const int64_t k = request.k(), n = request.n(), m = request.m();
  const ScalarType dtype = u.scalar_type();
  check_tensor(lse, "lse", dtype, {k, n});
  check_tensor(grad_lse, "grad_lse", dtype, {k, n});
  STD_TORCH_CHECK(!grad_col_lse || (v && col_lse), "grad_col_lse needs two sets and col_lse.");
  if (grad_col_lse) {
    check_tensor(*col_lse, "col_lse", dtype, {k, m});
    check_tensor(*grad_col_lse, "grad_col_lse", dtype, {k, m});
  }
  STD_TORCH_CHECK(v || !need_v, "one set has one gradient, du.");
  const auto nothing = [&] { return empty(u, {0}); };
  const Tensor du = need_u ? empty(u, {n, u.size(1)}) : nothing(), dv = need_v ? empty(u, {m, u.size(1)}) : nothing();
  if (!need_u && !need_v) return {du, dv};
  const PairTables tables(request.pairs());
  for_float_or_double(dtype, [&](auto zero) {
    using T = decltype(zero);
    row_stats_backward<T>(
        request.problem<T>(tables),
        {data<T>(lse), data<T>(grad_lse), grad_col_lse ? data<T>(col_lse) : nullptr, data<T>(grad_col_lse)},
        data_if<T>(du, need_u), data_if<T>(dv, need_v));
  });
  return {du, dv};
}

std::tuple<Tensor, Tensor> top_columns_cpu(const Tensor& scorers, const Tensor& features, int64_t k, int64_t num_images,
                                           MaybeTensor col_ids) {
  const ScalarType dtype = scorers.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scorers must be float32 or float64.");
  STD_TORCH_CHECK(scorers.dim() == 3 && scorers.size(0) > 0 && features.dim() == 2,
                  "scorers must be [S, G, E] and features [M, E].");
  const int64_t views = scorers.size(0), groups = scorers.size(1), dim = scorers.size(2), m = features.size(0);
  check_tensor(scorers, "scorers", dtype, {views, groups, dim});
  check_tensor(features, "features", dtype, {m, dim});
  if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, {m});
  STD_TORCH_CHECK(k > 0 && (num_images == 0 || num_images == groups), "k must be positive, num_images 0 or G.");
  const Tensor scores = empty(scorers, {groups, k});
  const int64_t sizes[] = {groups, k};
  const Tensor columns = torch::stable::new_empty(scorers, {sizes, 2}, ScalarType::Long);
  for_float_or_double(dtype, [&](auto zero) {
    using T = decltype(zero);
    top_columns<T>({{data<T>(scorers), data<T>(features), views, groups, dim},
                    m,
                    k,
                    num_images,
                    data<int64_t>(col_ids),
                    data<T>(scores),
                    data<int64_t>(columns)});
  });
  return {scores, columns};
}

RankRule rank_rule(const std::vector<double>& ranking, int64_t bins) {
  STD_TORCH_CHECK(ranking.size() == 5, "ranking must hold the coefficients b, c, eps, low, high.");
  STD_TORCH_CHECK(bins >= 0 && bins != 1, "bins must be 0 (exact ranks) or at least 2; got ", bins, ".");
  return {ranking[0], ranking[1], ranking[2], ranking[3], ranking[4], bins};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ranked_forward_cpu(
    const Tensor& u, MaybeTensor v, double scale, std::vector<double> exponents, int64_t num_images,
    int64_t positive_offset, bool only_equal_ids, MaybeTensor row_ids, MaybeTensor col_ids, MaybeTensor ignored,
    MaybeTensor gate_scorers, MaybeTensor gate_features, MaybeTensor gate_row_limit, MaybeTensor gate_col_limit,
    bool unit, std::vector<double> ranking, int64_t bins, bool diagnostics) {
  const Request request{u,       v,       scale,   exponents,    num_images,    positive_offset, only_equal_ids,
                        row_ids, col_ids, ignored, gate_scorers, gate_features, gate_row_limit,  gate_col_limit,
                        unit};
  request.check();
  const RankRule rule = rank_rule(ranking, bins);
  const int64_t n = request.n();
  const Tensor lse = empty(u, {n}), aux = empty(u, {diagnostics ? 6 : 1, n});
  const Tensor axis = bins ? empty(u, {3, n}) : empty(u, {0}), below = bins ? empty(u, {n, bins + 1}) : empty(u, {0});
  const PairTables tables(request.pairs());
  for_float_or_double(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RankedResults<T> results{data<T>(lse), data<T>(aux), data<T>(axis), data<T>(below), diagnostics};
    const auto forward = bins ? histogram_ranks_forward<T> : exact_ranks_forward<T>;
    forward(request.problem<T>(tables), rule, results);
  });
  return {lse, aux, axis, below};
}

std::tuple<Tensor, Tensor> ranked_backward_cpu(const Tensor& u, MaybeTensor v, double scale,
                                               std::vector<double> exponents, int64_t num_images,
                                               int64_t positive_offset, bool only_equal_ids, MaybeTensor row_ids,
                                               MaybeTensor col_ids, MaybeTensor ignored, MaybeTensor gate_scorers,
                                               MaybeTensor gate_features, MaybeTensor gate_row_limit,
                                               MaybeTensor gate_col_limit, bool unit, std::vector<double> ranking,
                                               int64_t bins, const Tensor& lse, const Tensor& axis, const Tensor& below,
                                               const Tensor& grad_lse, bool need_u, bool need_v) {
  const Request request{u,       v,       scale,   exponents,    num_images,    positive_offset, only_equal_ids,
                        row_ids, col_ids, ignored, gate_scorers, gate_features, gate_row_limit,  gate_col_limit,
                        unit};
  request.check();
  const RankRule rule = rank_rule(ranking, bins);
  const int64_t n = request.n(), m = request.m();
  const ScalarType dtype = u.scalar_type();
  check_tensor(lse, "lse", dtype, {n});
  check_tensor(grad_lse, "grad_lse", dtype, {n});
  if (bins) {
    check_tensor(axis, "axis", dtype, {3, n});
    check_tensor(below, "below", dtype, {n, bins + 1});
  }
  STD_TORCH_CHECK(v || !need_v, "one set has one gradient, du.");
  const auto nothing = [&] { return empty(u, {0}); };
  const Tensor du = need_u ? empty(u, {n, u.size(1)}) : nothing(), dv = need_v ? empty(u, {m, u.size(1)}) : nothing();
  if (!need_u && !need_v) return {du, dv};
  const PairTables tables(request.pairs());
  for_float_or_double(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto backward = bins ? histogram_ranks_backward<T> : exact_ranks_backward<T>;
    backward(request.problem<T>(tables), rule, {data<T>(lse), data<T>(axis), data<T>(below), data<T>(grad_lse)},
             data_if<T>(du, need_u), data_if<T>(dv, need_v));
  });
  return {du, dv};
}

#if !defined(CONTRASTIVE_EXT_VERSION)
#define CONTRASTIVE_EXT_VERSION "not stated"
#endif

// One line of JSON: what was built and what runs on this CPU; without nvcc there are no cuda_archs.
std::string native_build_info() {
  const uint64_t target = TORCH_FEATURE_VERSION;
  int count = 0;
  const Isa* isas = compiled_isas(&count);
  std::string paths;
  for (int i = 0; i < count; ++i) paths += std::string(i ? ", " : "") + "\"" + isas[i].name + "\"";
  return "{\"version\": \"" CONTRASTIVE_EXT_VERSION "\", \"abi_target\": \"" + std::to_string(target >> 56) + "." +
         std::to_string((target >> 48) & 0xff) + "\", \"compiler\": \"" +
#if defined(__clang__)
         "clang "
#else
         "gcc "
#endif
         + std::string(__VERSION__) + "\", \"cpu_isas\": [" + paths + "], \"cpu_isa\": \"" + chosen_isa().name +
#if defined(CONTRASTIVE_EXT_CUDA_ARCHS)
         "\", \"cuda_archs\": \"" CONTRASTIVE_EXT_CUDA_ARCHS +
#endif
         "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(contrastive_ext, m) {
#define CE_PROBLEM                                                                                                  \
  "Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int positive_offset, bool only_equal_ids, " \
  "Tensor? row_ids, Tensor? col_ids, Tensor? ignored, Tensor? gate_scorers, Tensor? gate_features, "                \
  "Tensor? gate_row_limit, Tensor? gate_col_limit, bool unit"
  m.def("row_stats_forward_cpu(" CE_PROBLEM
        ", bool columns, bool means, bool diagnostics, bool maximum) -> "
        "(Tensor lse, Tensor aux, Tensor col_lse, Tensor col_aux, Tensor mean)");
  m.def("row_stats_backward_cpu(" CE_PROBLEM
        ", Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, bool need_u, bool need_v) -> "
        "(Tensor du, Tensor dv)");
  m.def("ranked_stats_forward_cpu(" CE_PROBLEM
        ", float[] ranking, int bins, bool diagnostics) -> (Tensor lse, Tensor aux, Tensor axis, Tensor below)");
  m.def("ranked_stats_backward_cpu(" CE_PROBLEM
        ", float[] ranking, int bins, Tensor lse, Tensor axis, Tensor below, Tensor grad_lse, bool need_u, "
        "bool need_v) -> (Tensor du, Tensor dv)");
#undef CE_PROBLEM
  m.def(
      "top_columns_cpu(Tensor scorers, Tensor features, int k, int num_images, Tensor? col_ids) -> "
      "(Tensor scores, Tensor columns)");
  m.def("native_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CPU, m) {
  m.impl("row_stats_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("row_stats_backward_cpu", TORCH_BOX(&backward_cpu));
  m.impl("top_columns_cpu", TORCH_BOX(&top_columns_cpu));
  m.impl("ranked_stats_forward_cpu", TORCH_BOX(&ranked_forward_cpu));
  m.impl("ranked_stats_backward_cpu", TORCH_BOX(&ranked_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CompositeExplicitAutograd, m) {
  m.impl("native_build_info", TORCH_BOX(&native_build_info));
}

}  // namespace contrastive_ext
