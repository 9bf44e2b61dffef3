// The operators on the CPU: checks, allocation, the call of a kernel. Python owns autograd, the kernels own the
// mathematics, csrc/operators.cpp the schemas.
#include <tuple>

#include "../compat.h"
#include "pair_sums.h"
#include "ranked_stats.h"
#include "request.h"
#include "row_stats_backward.h"
#include "row_stats_forward.h"
#include "tensors.h"
#include "top_columns.h"

namespace contrastive_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_forward_cpu(const Request& request, bool columns,
                                                                         bool means, bool diagnostics, bool maximum) {
  STD_TORCH_CHECK(request.v || !columns, "one set has no column statistics of its own: its columns are its rows.");
  const Tensor& u = request.u;
  const int64_t k = request.k(), n = request.n(), m = request.m(), aux_rows = diagnostics ? 4 : maximum ? 2 : 1;
  const auto nothing = [&] { return empty(u, {0}); };  // its own tensor each time: outputs must not alias
  const Tensor lse = empty(u, {k, n}), aux = empty(u, {aux_rows, n});
  const Tensor col_lse = columns ? empty(u, {k, m}) : nothing(),
               col_aux = columns ? empty(u, {aux_rows, m}) : nothing();
  const Tensor mean = means ? empty(u, {k, n, u.size(1)}) : nothing();
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    row_stats_forward<T>(problem, {data<T>(lse), data<T>(aux), data_if<T>(col_lse, columns),
                                   data_if<T>(col_aux, columns), data_if<T>(mean, means), diagnostics, maximum});
  });
  return {lse, aux, col_lse, col_aux, mean};
}

std::tuple<Tensor, Tensor> row_stats_backward_cpu(const Request& request, const Tensor& lse, const Tensor& grad_lse,
                                                  MaybeTensor col_lse, MaybeTensor grad_col_lse, bool need_u,
                                                  bool need_v) {
  const int64_t k = request.k(), n = request.n(), m = request.m();
  const ScalarType dtype = request.u.scalar_type();
  check_tensor(lse, "lse", dtype, {k, n});
  check_tensor(grad_lse, "grad_lse", dtype, {k, n});
  STD_TORCH_CHECK(!grad_col_lse || (request.v && col_lse), "grad_col_lse needs two sets and col_lse.");
  if (grad_col_lse) {
    check_tensor(*col_lse, "col_lse", dtype, {k, m});
    check_tensor(*grad_col_lse, "grad_col_lse", dtype, {k, m});
  }
  const Gradients gradients(request, need_u, need_v);
  if (!need_u && !need_v) return gradients.results();
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    row_stats_backward<T>(
        problem, {data<T>(lse), data<T>(grad_lse), grad_col_lse ? data<T>(col_lse) : nullptr, data<T>(grad_col_lse)},
        data_if<T>(gradients.du, need_u), data_if<T>(gradients.dv, need_v));
  });
  return gradients.results();
}

RankRule rank_rule(const std::vector<double>& ranking, int64_t bins) {
  STD_TORCH_CHECK(ranking.size() == 5, "ranking must hold the coefficients b, c, eps, low, high.");
  STD_TORCH_CHECK(bins >= 0 && bins != 1, "bins must be 0 (exact ranks) or at least 2; got ", bins, ".");
  return {ranking[0], ranking[1], ranking[2], ranking[3], ranking[4], bins};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ranked_stats_forward_cpu(const Request& request, std::vector<double> ranking,
                                                                    int64_t bins, bool diagnostics) {
  const RankRule rule = rank_rule(ranking, bins);
  const Tensor& u = request.u;
  const int64_t n = request.n();
  const Tensor lse = empty(u, {n}), aux = empty(u, {diagnostics ? 6 : 1, n});
  const Tensor axis = bins ? empty(u, {3, n}) : empty(u, {0}), below = bins ? empty(u, {n, bins + 1}) : empty(u, {0});
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    const RankedResults<T> results{data<T>(lse), data<T>(aux), data<T>(axis), data<T>(below), diagnostics};
    const auto forward = bins ? histogram_ranks_forward<T> : exact_ranks_forward<T>;
    forward(problem, rule, results);
  });
  return {lse, aux, axis, below};
}

std::tuple<Tensor, Tensor> ranked_stats_backward_cpu(const Request& request, std::vector<double> ranking, int64_t bins,
                                                     const Tensor& lse, const Tensor& axis, const Tensor& below,
                                                     const Tensor& grad_lse, bool need_u, bool need_v) {
  const RankRule rule = rank_rule(ranking, bins);
  const int64_t n = request.n();
  const ScalarType dtype = request.u.scalar_type();
  check_tensor(lse, "lse", dtype, {n});
  check_tensor(grad_lse, "grad_lse", dtype, {n});
  if (bins) {
    check_tensor(axis, "axis", dtype, {3, n});
    check_tensor(below, "below", dtype, {n, bins + 1});
  }
  const Gradients gradients(request, need_u, need_v);
  if (!need_u && !need_v) return gradients.results();
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    const auto backward = bins ? histogram_ranks_backward<T> : exact_ranks_backward<T>;
    backward(problem, rule, {data<T>(lse), data<T>(axis), data<T>(below), data<T>(grad_lse)},
             data_if<T>(gradients.du, need_u), data_if<T>(gradients.dv, need_v));
  });
  return gradients.results();
}

void check_pair_sums(const Request& request, const Tensor& offset, double sign) {
  STD_TORCH_CHECK(request.v, "sums over pairs take two sets; rows against themselves are given twice.");
  STD_TORCH_CHECK(sign == 1.0 || sign == -1.0, "sign must be 1 or -1; got ", sign, ".");
  check_tensor(offset, "offset", request.u.scalar_type(), {request.n()});
}

std::tuple<Tensor, Tensor, Tensor> pair_sums_forward_cpu(const Request& request, const Tensor& offset, double sign) {
  check_pair_sums(request, offset, sign);
  const int64_t n = request.n();
  const Tensor sum = empty(request.u, {n}), slope = empty(request.u, {n}), count = empty(request.u, {n});
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    pair_sums_forward<T>(problem, {static_cast<T>(sign), data<T>(offset)},
                         {data<T>(sum), data<T>(slope), data<T>(count)});
  });
  return {sum, slope, count};
}

std::tuple<Tensor, Tensor> pair_sums_backward_cpu(const Request& request, const Tensor& offset, double sign,
                                                  const Tensor& grad_sum, bool need_u, bool need_v) {
  check_pair_sums(request, offset, sign);
  check_tensor(grad_sum, "grad_sum", request.u.scalar_type(), {request.n()});
  const Gradients gradients(request, need_u, need_v);
  if (!need_u && !need_v) return gradients.results();
  request.compute([&](auto zero, const auto& problem) {
    using T = decltype(zero);
    pair_sums_backward<T>(problem, {static_cast<T>(sign), data<T>(offset)}, data<T>(grad_sum),
                          data_if<T>(gradients.du, need_u), data_if<T>(gradients.dv, need_v));
  });
  return gradients.results();
}

std::tuple<Tensor, Tensor> top_columns_cpu(const Tensor& scorers, MaybeTensor features, int64_t k, int64_t num_images,
                                           MaybeTensor col_ids, MaybeTensor row_ids, MaybeTensor excluded,
                                           MaybeTensor below) {
  const ScalarType dtype = scorers.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scorers must be float32 or float64.");
  STD_TORCH_CHECK(scorers.dim() == 3 && scorers.size(0) > 0 && (!features || features->dim() == 2),
                  "scorers must be [S, G, E] and features [M, E].");
  const int64_t views = scorers.size(0), groups = scorers.size(1), dim = scorers.size(2),
                m = features ? features->size(0) : views * groups;
  check_tensor(scorers, "scorers", dtype, {views, groups, dim});
  if (features) check_tensor(*features, "features", dtype, {m, dim});
  if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, {m});
  if (row_ids) check_tensor(*row_ids, "row_ids", ScalarType::Long, {groups});
  if (excluded) check_tensor(*excluded, "excluded", ScalarType::Long, {groups});
  if (below) check_tensor(*below, "below", dtype, {groups});
  STD_TORCH_CHECK(k > 0 && (num_images == 0 || num_images == groups), "k must be positive, num_images 0 or G.");
  const Tensor scores = empty(scorers, {groups, k});
  const int64_t sizes[] = {groups, k};
  const Tensor columns = torch::stable::new_empty(scorers, {sizes, 2}, ScalarType::Long);
  for_float_or_double(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* vectors = data<T>(scorers);
    top_columns<T>({{vectors, views, groups, dim, {features ? data<T>(features) : vectors, m, dim}},
                    !features,
                    m,
                    k,
                    num_images,
                    data<int64_t>(col_ids),
                    data<int64_t>(row_ids),
                    data<int64_t>(excluded),
                    data<T>(below),
                    data<T>(scores),
                    data<int64_t>(columns)});
  });
  return {scores, columns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CPU, m) {
  m.impl("row_stats_forward_cpu", TORCH_BOX(&Flat<&row_stats_forward_cpu>::call));
  m.impl("row_stats_backward_cpu", TORCH_BOX(&Flat<&row_stats_backward_cpu>::call));
  m.impl("ranked_stats_forward_cpu", TORCH_BOX(&Flat<&ranked_stats_forward_cpu>::call));
  m.impl("ranked_stats_backward_cpu", TORCH_BOX(&Flat<&ranked_stats_backward_cpu>::call));
  m.impl("pair_sums_forward_cpu", TORCH_BOX(&Flat<&pair_sums_forward_cpu>::call));
  m.impl("pair_sums_backward_cpu", TORCH_BOX(&Flat<&pair_sums_backward_cpu>::call));
  m.impl("top_columns_cpu", TORCH_BOX(&top_columns_cpu));
}

}  // namespace contrastive_ext
