// Rows to unit length as sweeps take them, and the gradient: what prologue.h says of a row, for rows alone. Schemas are
// in csrc/operators.cpp, autograd is contrastive_ext/operators/unit_rows.py.
#include <string>
#include <tuple>

#include "prologue.h"
#include "tensors.h"

namespace contrastive_ext {
namespace {

// Rounds a row to the values of fp16 or bf16, if `dtype` is one of them.
void round_row(float* row, int64_t d, ScalarType dtype) {
  if (dtype == ScalarType::Half)
    for (int64_t c = 0; c < d; ++c) row[c] = static_cast<float>(static_cast<c10::Half>(row[c]));
  else if (dtype == ScalarType::BFloat16)
    for (int64_t c = 0; c < d; ++c) row[c] = static_cast<float>(static_cast<c10::BFloat16>(row[c]));
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& z, ScalarType operand_dtype) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be a matrix [N, D].");
  const int64_t n = z.size(0), d = z.size(1);
  check_tensor(z, "z", z.scalar_type(), {n, d});
  const Tensor unit = empty_as(z, {n, d}, stats_dtype(z)), norm = empty_as(z, {n}, stats_dtype(z));
  for_input_dtype(z.scalar_type(), [&](auto t, auto in) {
    using T = decltype(t);
    using In = decltype(in);
    for_each_row(n, d, [&](int64_t i) {
      const In* from = data<In>(z) + i * d;
      T* row = data<T>(unit) + i * d;
      for (int64_t c = 0; c < d; ++c) row[c] = static_cast<T>(from[c]);
      data<T>(norm)[i] = to_unit_length(row, d);
      if constexpr (std::is_same_v<T, float>) round_row(row, d, operand_dtype);
    });
  });
  return {unit, norm};
}

Tensor backward_cpu(const Tensor& z, const Tensor& norm, const Tensor& grad) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be a matrix [N, D].");
  const int64_t n = z.size(0), d = z.size(1);
  check_tensor(z, "z", z.scalar_type(), {n, d});
  check_tensor(norm, "norm", stats_dtype(z), {n});
  check_tensor(grad, "grad", stats_dtype(z), {n, d});
  const Tensor dz = empty(z, {n, d});
  for_input_dtype(z.scalar_type(), [&](auto t, auto in) {
    using T = decltype(t);
    using In = decltype(in);
    for_each_row(n, d, [&](int64_t i) {
      row_gradient<T, In>(data<In>(z) + i * d, data<T>(norm) + i, nullptr, T(0), d, data<T>(grad) + i * d,
                          data<In>(dz) + i * d);
    });
  });
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CPU, m) {
  m.impl("unit_rows_cpu", TORCH_BOX(&forward_cpu));
  m.impl("unit_rows_backward_cpu", TORCH_BOX(&backward_cpu));
}

}  // namespace contrastive_ext
