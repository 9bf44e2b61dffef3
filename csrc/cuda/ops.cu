// The operators of the Hopper kernels: checks, allocation; their schemas are in csrc/operators.cpp. Compiled by nvcc,
// so they exist exactly where the kernels do. The stream comes as a number from Python: the stable ABI has no call for
// it before torch 2.13, and the one of libtorch_cuda is out of sight for a library that must also load beside a CPU
// build of torch.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../compat.h"
#include "row_stats_backward.h"
#include "row_stats_forward.h"

namespace contrastive_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_cuda(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); }

void check_tensor(const Tensor& t, const char* name, ScalarType dtype, int device, int64_t rows, int64_t features) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, " must be on the CUDA device of u.");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name,
                  " has the wrong dtype: u and v share float16 or bfloat16, ids are int64.");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous().");
  STD_TORCH_CHECK(t.dim() == (features ? 2 : 1) && t.size(0) == rows && (!features || t.size(1) == features), name,
                  " has the wrong shape.");
}

const int64_t* ids_of(const std::optional<Tensor>& ids) {
  return ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr;
}

// The arguments that describe a problem, checked.
struct Call {
  const Tensor& u;
  const std::optional<Tensor>& v;
  const std::optional<Tensor>& scale;
  double scale_value, exponent;
  int64_t num_images, positive_offset;
  const std::optional<Tensor>&row_ids, &col_ids;
  bool unit;

  int64_t n() const { return u.size(0); }
  int64_t m() const { return v ? v->size(0) : n(); }
  int features() const { return static_cast<int>(u.size(1)); }
  bool is_bfloat16() const { return u.scalar_type() == ScalarType::BFloat16; }
  const void* rows() const { return u.const_data_ptr(); }
  const void* columns() const { return v ? v->const_data_ptr() : rows(); }
  Tensor empty(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(u, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                    ScalarType::Float);
  }

  void check() const {
    constexpr int64_t kMostRows = int64_t{1} << 30;  // coordinates of TMA are 32-bit
    const int device = u.is_cuda() ? u.get_device_index() : -1;
    STD_TORCH_CHECK(u.dim() == 2 && (!v || v->dim() == 2), "u and v must be matrices [N, D] and [M, D].");
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "u must be float16 or bfloat16.");
    check_tensor(u, "u", dtype, device, n(), features());
    if (v) check_tensor(*v, "v", dtype, device, m(), features());
    if (row_ids) check_tensor(*row_ids, "row_ids", ScalarType::Long, device, n(), 0);
    if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, device, m(), 0);
    if (scale)
      STD_TORCH_CHECK(scale->is_cuda() && scale->get_device_index() == device && scale->dim() == 0 &&
                          scale->scalar_type() == ScalarType::Float,
                      "a scale tensor must be 0-d float32 on the device of u.");
    STD_TORCH_CHECK(v || !col_ids, "one set takes row_ids only; they serve both sides.");
    STD_TORCH_CHECK(scale || scale_value > 0.0, "scale must be positive; got ", scale_value, ".");
    STD_TORCH_CHECK(exponent > 0.0, "the exponent must be positive; got ", exponent, ".");
    STD_TORCH_CHECK(n() <= kMostRows && m() <= kMostRows, "at most 2^30 rows and columns; got ", n(), " and ", m(),
                    ".");
    STD_TORCH_CHECK(num_images >= 0 && positive_offset >= 0 && (num_images == 0 || positive_offset + n() <= m()),
                    "num_images and positive_offset must not be negative, positive_offset + N at most M.");
  }

  // What both kernels are told; `by_columns`: with the roles of u and v swapped.
  hopper::SweepArguments arguments(bool by_columns = false) const {
    hopper::SweepArguments made{};
    const int64_t *of_rows = ids_of(row_ids), *of_columns = ids_of(v ? col_ids : row_ids);
    made.pairs.num_rows = n(), made.pairs.num_images = num_images;
    (by_columns ? made.pairs.first_row : made.pairs.positive_offset) = positive_offset;
    made.pairs.row_ids = by_columns ? of_columns : of_rows, made.pairs.col_ids = by_columns ? of_rows : of_columns;
    made.n = by_columns ? m() : n(), made.m = by_columns ? n() : m();
    made.beta = static_cast<float>(exponent), made.scale = static_cast<float>(scale_value), made.unit = unit;
    made.scale_tensor = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
    return made;
  }
};

float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// The device of a call is current as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& u) : guard_(u.get_device_index()) {
    check_cuda(cudaSetDevice(u.get_device_index()));  // this library's runtime is its own, linked statically
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, u.get_device_index()));
  }
  int processors = 0;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& u, std::optional<Tensor> v,
                                                        std::optional<Tensor> scale, double scale_value,
                                                        double exponent, int64_t num_images, int64_t positive_offset,
                                                        std::optional<Tensor> row_ids, std::optional<Tensor> col_ids,
                                                        bool unit, bool columns, int64_t stream) {
  const Call call{u, v, scale, scale_value, exponent, num_images, positive_offset, row_ids, col_ids, unit};
  call.check();
  STD_TORCH_CHECK(v || !columns, "the statistics of one set's columns are those of its rows.");
  const OnDevice device(u);
  const int64_t n = call.n(), m = call.m();
  const hopper::ForwardPlan plan = hopper::forward_plan(n, m, device.processors, columns);
  const Tensor lse = call.empty({1, n}), count = call.empty({1, n}), partials = call.empty({plan.partials(n)});
  const auto of_columns = [&](int64_t rows, int64_t size) {
    return columns ? call.empty({rows, size}) : call.empty({0});
  };
  const Tensor col_lse = of_columns(1, m), col_count = of_columns(1, m);
  const Tensor column_partials = of_columns(1, plan.column_partials(n, m));
  const auto if_columns = [&](const Tensor& t) { return columns ? data(t) : nullptr; };
  const hopper::ForwardArguments arguments{call.arguments(), data(partials), if_columns(column_partials), {}};
  const hopper::ForwardResults results{data(lse), data(count), if_columns(col_lse), if_columns(col_count)};
  const char* error = hopper::row_stats_forward(call.rows(), call.columns(), call.features(), call.is_bfloat16(),
                                                arguments, plan, results, reinterpret_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(!error, "row_stats_forward_cuda: ", error);
  return {lse, count, col_lse, col_count};
}

// lse and coefficients of the anchors of one side, or nothing.
struct Term {
  const float *lse = nullptr, *grad = nullptr;
};

Term term_of(const std::optional<Tensor>& lse, const std::optional<Tensor>& grad, const Tensor& u, int64_t anchors) {
  STD_TORCH_CHECK(lse.has_value() == grad.has_value(), "lse and their gradient come together.");
  if (!lse) return {};
  for (const auto& x : {*lse, *grad})
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == u.get_device_index() && x.is_contiguous() &&
                        x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.size(0) == 1 && x.size(1) == anchors,
                    "lse and their gradient must be contiguous float32 [1, ", anchors, "] on the device of u.");
  return {static_cast<const float*>(lse->const_data_ptr()), static_cast<const float*>(grad->const_data_ptr())};
}

// One sweep: the gradient by u, or by v.
Tensor gradient(const Call& call, bool by_columns, Term rows, Term columns, const OnDevice& device,
                cudaStream_t stream) {
  if (by_columns) std::swap(rows, columns);
  const hopper::SweepArguments sweep = call.arguments(by_columns);
  const int64_t n = sweep.n, m = sweep.m, features = call.features();
  const int splits = hopper::backward_splits(n, m, call.features(), device.processors);
  const Tensor out = call.empty({n, features});
  const Tensor workspace = call.empty({hopper::backward_workspace(n, m, call.features(), splits)});
  const hopper::BackwardArguments arguments{sweep,        rows.lse,        rows.grad, columns.lse,
                                            columns.grad, data(workspace), data(out)};
  const char* error =
      hopper::row_stats_backward(by_columns ? call.columns() : call.rows(), by_columns ? call.rows() : call.columns(),
                                 call.features(), call.is_bfloat16(), arguments, splits, stream);
  STD_TORCH_CHECK(!error, "row_stats_backward_cuda: ", error);
  return out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& u, std::optional<Tensor> v, std::optional<Tensor> scale,
                                         double scale_value, double exponent, int64_t num_images,
                                         int64_t positive_offset, std::optional<Tensor> row_ids,
                                         std::optional<Tensor> col_ids, bool unit, const Tensor& lse,
                                         const Tensor& grad_lse, std::optional<Tensor> col_lse,
                                         std::optional<Tensor> grad_col_lse, bool need_u, bool need_v, int64_t stream) {
  const Call call{u, v, scale, scale_value, exponent, num_images, positive_offset, row_ids, col_ids, unit};
  call.check();
  STD_TORCH_CHECK(v || (!col_lse && !need_v), "one set has one gradient, from the statistics of its rows.");
  const OnDevice device(u);
  const Term rows = term_of(lse, grad_lse, u, call.n());
  const Term columns = v ? term_of(col_lse, grad_col_lse, u, call.m()) : rows;  // both directions of one set
  const auto on_stream = reinterpret_cast<cudaStream_t>(stream);
  const auto part = [&](bool needed, bool by_columns) {
    return needed ? gradient(call, by_columns, rows, columns, device, on_stream) : call.empty({0});
  };
  return {part(need_u, false), part(need_v, true)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CUDA, m) {
  m.impl("row_stats_forward_cuda", TORCH_BOX(&forward_cuda));
  m.impl("row_stats_backward_cuda", TORCH_BOX(&backward_cuda));
}

}  // namespace contrastive_ext
