// The operators: schema, checks, allocation. Python owns autograd, the kernels own the mathematics.
#include <optional>
#include <string>
#include <tuple>

#include "compat.h"
#include "ranked_stats.h"
#include "row_stats_backward.h"
#include "row_stats_forward.h"

namespace contrastive_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <class T>
T* data_if(const Tensor& t, bool wanted) {
  return wanted ? data<T>(t) : nullptr;
}

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

void check_tensor(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU.");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name,
                  " has the wrong dtype: u, v, lse and their gradients share float32 or float64, ids are int64.");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous().");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && t.size(axis++) == size;
  STD_TORCH_CHECK(same, name, " has the wrong shape.");
}

// The operands both directions share, checked.
struct Request {
  const Tensor& u;
  const std::optional<Tensor>& v;
  double scale;
  const std::vector<double>& exponents;
  int64_t num_images, positive_offset;
  const std::optional<Tensor>&row_ids, &col_ids;
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
  }

  template <class T>
  Problem<T> problem() const {
    Problem<T> p{data<T>(u), v ? data<T>(*v) : data<T>(u), n(), m(), u.size(1), /*one_set=*/!v, unit, scale, exponents,
                 {}};
    for (double& beta : p.exponents)
      beta = static_cast<double>(static_cast<T>(beta));  // as the dense formula rounds it
    p.pairs.num_rows = n(), p.pairs.num_images = num_images, p.pairs.positive_offset = positive_offset;
    p.pairs.row_ids = data<int64_t>(row_ids);
    p.pairs.col_ids = v ? data<int64_t>(col_ids) : p.pairs.row_ids;
    return p;
  }
};

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardTuple forward_cpu(const Tensor& u, std::optional<Tensor> v, double scale, std::vector<double> exponents,
                         int64_t num_images, int64_t positive_offset, std::optional<Tensor> row_ids,
                         std::optional<Tensor> col_ids, bool unit, bool columns, bool means, bool diagnostics) {
  const Request request{u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, unit};
  request.check();
  STD_TORCH_CHECK(v || !columns, "one set has no column statistics of its own: its columns are its rows.");
  const int64_t k = request.k(), n = request.n(), m = request.m(), aux_rows = diagnostics ? 4 : 1;
  const auto nothing = [&] { return empty(u, {0}); };  // its own tensor each time: outputs must not alias
  const Tensor lse = empty(u, {k, n}), aux = empty(u, {aux_rows, n});
  const Tensor col_lse = columns ? empty(u, {k, m}) : nothing(),
               col_aux = columns ? empty(u, {aux_rows, m}) : nothing();
  const Tensor mean = means ? empty(u, {k, n, u.size(1)}) : nothing();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    row_stats_forward<T>(request.problem<T>(), {data<T>(lse), data<T>(aux), data_if<T>(col_lse, columns),
                                                data_if<T>(col_aux, columns), data_if<T>(mean, means), diagnostics});
  };
  if (u.scalar_type() == ScalarType::Float)
    run(0.0f);
  else
    run(0.0);
  return {lse, aux, col_lse, col_aux, mean};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& u, std::optional<Tensor> v, double scale,
                                        std::vector<double> exponents, int64_t num_images, int64_t positive_offset,
                                        std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, bool unit,
                                        const Tensor& lse, const Tensor& grad_lse, std::optional<Tensor> col_lse,
                                        std::optional<Tensor> grad_col_lse, bool need_u, bool need_v) {
  const Request request{u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, unit};
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
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    row_stats_backward<T>(
        request.problem<T>(),
        {data<T>(lse), data<T>(grad_lse), grad_col_lse ? data<T>(col_lse) : nullptr, data<T>(grad_col_lse)},
        data_if<T>(du, need_u), data_if<T>(dv, need_v));
  };
  if (dtype == ScalarType::Float)
    run(0.0f);
  else
    run(0.0);
  return {du, dv};
}

RankRule rank_rule(const std::vector<double>& ranking, int64_t bins) {
  STD_TORCH_CHECK(ranking.size() == 4, "ranking must hold the coefficients a, b, low, high.");
  STD_TORCH_CHECK(bins >= 0 && bins != 1, "bins must be 0 (exact ranks) or at least 2; got ", bins, ".");
  return {ranking[0], ranking[1], ranking[2], ranking[3], bins};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ranked_forward_cpu(const Tensor& u, std::optional<Tensor> v, double scale,
                                                              std::vector<double> exponents, int64_t num_images,
                                                              int64_t positive_offset, std::optional<Tensor> row_ids,
                                                              std::optional<Tensor> col_ids, bool unit,
                                                              std::vector<double> ranking, int64_t bins,
                                                              bool diagnostics) {
  const Request request{u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, unit};
  request.check();
  const RankRule rule = rank_rule(ranking, bins);
  const int64_t n = request.n();
  const Tensor lse = empty(u, {n}), aux = empty(u, {diagnostics ? 6 : 1, n});
  const Tensor axis = bins ? empty(u, {3, n}) : empty(u, {0}), below = bins ? empty(u, {n, bins + 1}) : empty(u, {0});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const RankedResults<T> results{data<T>(lse), data<T>(aux), data<T>(axis), data<T>(below), diagnostics};
    const auto forward = bins ? histogram_ranks_forward<T> : exact_ranks_forward<T>;
    forward(request.problem<T>(), rule, results);
  };
  if (u.scalar_type() == ScalarType::Float)
    run(0.0f);
  else
    run(0.0);
  return {lse, aux, axis, below};
}

std::tuple<Tensor, Tensor> ranked_backward_cpu(const Tensor& u, std::optional<Tensor> v, double scale,
                                               std::vector<double> exponents, int64_t num_images,
                                               int64_t positive_offset, std::optional<Tensor> row_ids,
                                               std::optional<Tensor> col_ids, bool unit, std::vector<double> ranking,
                                               int64_t bins, const Tensor& lse, const Tensor& axis, const Tensor& below,
                                               const Tensor& grad_lse, bool need_u, bool need_v) {
  const Request request{u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, unit};
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
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto backward = bins ? histogram_ranks_backward<T> : exact_ranks_backward<T>;
    backward(request.problem<T>(), rule, {data<T>(lse), data<T>(axis), data<T>(below), data<T>(grad_lse)},
             data_if<T>(du, need_u), data_if<T>(dv, need_v));
  };
  if (dtype == ScalarType::Float)
    run(0.0f);
  else
    run(0.0);
  return {du, dv};
}

// One line of JSON: what was built and what runs on this CPU.
std::string native_build_info() {
  const uint64_t target = TORCH_FEATURE_VERSION;
  int count = 0;
  const Isa* isas = compiled_isas(&count);
  std::string paths;
  for (int i = 0; i < count; ++i) paths += std::string(i ? ", " : "") + "\"" + isas[i].name + "\"";
  return "{\"abi_target\": \"" + std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff) +
         "\", \"compiler\": \"" +
#if defined(__clang__)
         "clang "
#else
         "gcc "
#endif
         + std::string(__VERSION__) + "\", \"cpu_isas\": [" + paths + "], \"cpu_isa\": \"" + chosen_isa().name + "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(contrastive_ext, m) {
  m.def(
      "row_stats_forward_cpu(Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int positive_offset, "
      "Tensor? row_ids, "
      "Tensor? col_ids, bool unit, bool columns, bool means, bool diagnostics) -> (Tensor lse, Tensor aux, Tensor "
      "col_lse, Tensor col_aux, "
      "Tensor mean)");
  m.def(
      "row_stats_backward_cpu(Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int "
      "positive_offset, Tensor? row_ids, "
      "Tensor? col_ids, bool unit, Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, bool need_u, "
      "bool need_v) -> "
      "(Tensor du, Tensor dv)");
  m.def(
      "ranked_stats_forward_cpu(Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int "
      "positive_offset, Tensor? row_ids, Tensor? col_ids, bool unit, float[] ranking, int bins, bool diagnostics) -> "
      "(Tensor lse, Tensor aux, Tensor axis, Tensor below)");
  m.def(
      "ranked_stats_backward_cpu(Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int "
      "positive_offset, Tensor? row_ids, Tensor? col_ids, bool unit, float[] ranking, int bins, Tensor lse, Tensor "
      "axis, Tensor below, Tensor grad_lse, bool need_u, bool need_v) -> (Tensor du, Tensor dv)");
  m.def("native_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CPU, m) {
  m.impl("row_stats_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("row_stats_backward_cpu", TORCH_BOX(&backward_cpu));
  m.impl("ranked_stats_forward_cpu", TORCH_BOX(&ranked_forward_cpu));
  m.impl("ranked_stats_backward_cpu", TORCH_BOX(&ranked_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CompositeExplicitAutograd, m) {
  m.impl("native_build_info", TORCH_BOX(&native_build_info));
}

}  // namespace contrastive_ext
