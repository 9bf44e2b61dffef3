// The operator of the Hopper forward: checks, allocation; its schema is in csrc/operators.cpp. Compiled by nvcc, so it
// exists exactly where the kernels do. The stream comes as a number from Python: the stable ABI has no call for it
// before torch 2.13, and the one of libtorch_cuda is out of sight for a library that must also load beside a CPU build
// of torch.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <tuple>

#include "../compat.h"
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

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& u, std::optional<Tensor> v, std::optional<Tensor> scale,
                                        double scale_value, double exponent, int64_t num_images,
                                        int64_t positive_offset, std::optional<Tensor> row_ids,
                                        std::optional<Tensor> col_ids, bool unit, int64_t stream) {
  constexpr int64_t kMostRows = int64_t{1} << 30;  // coordinates of TMA are 32-bit
  const int device = u.is_cuda() ? u.get_device_index() : -1;
  STD_TORCH_CHECK(u.dim() == 2 && (!v || v->dim() == 2), "u and v must be matrices [N, D] and [M, D].");
  const ScalarType dtype = u.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "u must be float16 or bfloat16.");
  const int64_t n = u.size(0), m = v ? v->size(0) : n, features = u.size(1);
  check_tensor(u, "u", dtype, device, n, features);
  if (v) check_tensor(*v, "v", dtype, device, m, features);
  if (row_ids) check_tensor(*row_ids, "row_ids", ScalarType::Long, device, n, 0);
  if (col_ids) check_tensor(*col_ids, "col_ids", ScalarType::Long, device, m, 0);
  if (scale)
    STD_TORCH_CHECK(scale->is_cuda() && scale->get_device_index() == device && scale->dim() == 0 &&
                        scale->scalar_type() == ScalarType::Float,
                    "a scale tensor must be 0-d float32 on the device of u.");
  STD_TORCH_CHECK(v || !col_ids, "one set takes row_ids only; they serve both sides.");
  STD_TORCH_CHECK(scale || scale_value > 0.0, "scale must be positive; got ", scale_value, ".");
  STD_TORCH_CHECK(exponent > 0.0, "the exponent must be positive; got ", exponent, ".");
  STD_TORCH_CHECK(n <= kMostRows && m <= kMostRows, "at most 2^30 rows and columns; got ", n, " and ", m, ".");
  STD_TORCH_CHECK(num_images >= 0 && positive_offset >= 0 && (num_images == 0 || positive_offset + n <= m),
                  "num_images and positive_offset must not be negative, positive_offset + N at most M.");

  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cudaSetDevice(device));  // this library's runtime is its own, linked statically
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));

  const int splits = hopper::forward_splits(n, m, processors);
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(u, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                    ScalarType::Float);
  };
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const Tensor lse = empty({1, n}), count = empty({1, n}), partials = empty({splits, hopper::kParts, n});
  hopper::ForwardArguments arguments{};
  arguments.pairs.num_rows = n, arguments.pairs.num_images = num_images;
  arguments.pairs.positive_offset = positive_offset;
  arguments.pairs.row_ids = ids_of(row_ids), arguments.pairs.col_ids = ids_of(v ? col_ids : row_ids);
  arguments.n = n, arguments.m = m;
  arguments.beta = static_cast<float>(exponent), arguments.scale = static_cast<float>(scale_value);
  arguments.scale_tensor = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  arguments.unit = unit, arguments.partials = data(partials);
  const void* columns = v ? v->const_data_ptr() : u.const_data_ptr();
  const char* error = hopper::row_stats_forward(u.const_data_ptr(), columns, static_cast<int>(features),
                                                dtype == ScalarType::BFloat16, arguments, splits, data(lse), data(count), reinterpret_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(!error, "row_stats_forward_cuda: ", error);
  return {lse, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CUDA, m) { m.impl("row_stats_forward_cuda", TORCH_BOX(&forward_cuda)); }

}  // namespace contrastive_ext
