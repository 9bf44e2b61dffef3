// The operators of whole_loss.h (schemas: csrc/operators.cpp); their autograd formula is
// contrastive_ext/operators/whole_loss.py.
#include <string>
#include <tuple>

#include "tensors.h"
#include "whole_loss.h"

namespace contrastive_ext {
namespace {

// 1/temperature, from a 0-d tensor where there is one.
double scale_of(const std::optional<Tensor>& tensor, double value) {
  if (!tensor) return value;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->numel() == 1 &&
                      (tensor->scalar_type() == ScalarType::Float || tensor->scalar_type() == ScalarType::Double),
                  "a scale tensor must hold one float32 or float64 number on the CPU.");
  return tensor->scalar_type() == ScalarType::Double ? *data<double>(*tensor)
                                                     : static_cast<double>(*data<float>(*tensor));
}

WholeLoss checked(const Tensor& z1, const Tensor& z2, double scale, const std::string& layout, bool normalize,
                  std::vector<double> exponents, const std::string& reduction) {
  STD_TORCH_CHECK(z1.dim() == 2 && z2.dim() == 2 && z1.size(0) > 0 && z1.size(1) > 0,
                  "z1 and z2 must be matrices [B, D] and [M, D], not empty.");
  WholeLoss whole{layout == "two_view", layout == "symmetric", normalize, z1.size(0), z2.size(0), z1.size(1), scale,
                  std::move(exponents), Reduction::kMean};
  STD_TORCH_CHECK(whole.two_view || whole.symmetric || layout == "one_way", "unknown layout ", layout, ".");
  STD_TORCH_CHECK(layout == "one_way" ? whole.m >= whole.b : whole.m == whole.b, "z2 has the wrong number of rows.");
  check_tensor(z1, "z1", z1.scalar_type(), {whole.b, whole.d});
  check_tensor(z2, "z2", z1.scalar_type(), {whole.m, whole.d});
  check_scale(scale);
  check_number_of_exponents(whole.k());
  STD_TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", "unknown reduction ", reduction,
                  ".");
  whole.reduction = reduction == "mean" ? Reduction::kMean : reduction == "sum" ? Reduction::kSum : Reduction::kNone;
  return whole;
}

template <class T>
WholeLossState<T> state_of(const Tensor& operands, const Tensor& norm, const Tensor& lse, const Tensor& coefficients) {
  return {data<T>(operands), data<T>(norm), data<T>(lse), data<T>(coefficients)};
}

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardTuple forward_cpu(const Tensor& z1, const Tensor& z2, std::optional<Tensor> scale_tensor, double scale,
                         std::string layout, bool normalize, std::string formula, std::vector<double> parameters,
                         std::vector<double> exponents, std::string reduction) {
  const ScalarType dtype = stats_dtype(z1);
  const WholeLoss whole = checked(z1, z2, scale_of(scale_tensor, scale), layout, normalize, exponents, reduction);
  const int64_t k = whole.k(), n = whole.anchors(), sides = whole.sides(), rows = whole.b + whole.m;
  const Tensor loss = whole.reduction == Reduction::kNone ? empty_as(z1, {sides * n}, dtype) : empty_as(z1, {}, dtype);
  const Tensor operands = empty_as(z1, {rows, whole.d}, dtype), norm = empty_as(z1, {rows}, dtype);
  const Tensor lse = empty_as(z1, {sides, k, n}, dtype), coefficients = empty_as(z1, {sides, k + 2, n}, dtype);
  const Tensor clamped = empty_as(z1, {}, dtype);
  for_input_dtype(z1.scalar_type(), [&](auto t, auto in) {
    using T = decltype(t);
    using In = decltype(in);
    RowLossParameters<T> row;
    STD_TORCH_CHECK(make_parameters(formula, parameters.data(), parameters.size(), &row) &&
                        (k == 2) == (row.formula == Formula::kHardNegative),
                    "no row loss ", formula, " with ", k, " exponents.");
    whole_loss_forward<T, In>(whole, row, data<In>(z1), data<In>(z2), state_of<T>(operands, norm, lse, coefficients),
                              data<T>(loss), data<T>(clamped));
  });
  return {loss, operands, norm, lse, coefficients, clamped};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& z1, const Tensor& z2, std::optional<Tensor> scale_tensor,
                                                double scale, std::string layout, bool normalize,
                                                std::vector<double> exponents, std::string reduction,
                                                const Tensor& operands, const Tensor& norm, const Tensor& lse,
                                                const Tensor& coefficients, const Tensor& grad_loss, bool need_scale) {
  const ScalarType dtype = stats_dtype(z1);
  const WholeLoss whole = checked(z1, z2, scale_of(scale_tensor, scale), layout, normalize, exponents, reduction);
  const int64_t k = whole.k(), n = whole.anchors(), sides = whole.sides(), rows = whole.b + whole.m;
  check_tensor(operands, "operands", dtype, {rows, whole.d});
  check_tensor(norm, "norm", dtype, {rows});
  check_tensor(lse, "lse", dtype, {sides, k, n});
  check_tensor(coefficients, "coefficients", dtype, {sides, k + 2, n});
  if (whole.reduction == Reduction::kNone)
    check_tensor(grad_loss, "grad_loss", dtype, {sides * n});
  else
    check_tensor(grad_loss, "grad_loss", dtype, {});
  const Tensor dz1 = empty(z1, {whole.b, whole.d}), dz2 = empty(z2, {whole.m, whole.d});
  const Tensor dscale = need_scale ? empty_as(z1, {}, dtype) : empty_as(z1, {0}, dtype);
  for_input_dtype(z1.scalar_type(), [&](auto t, auto in) {
    using T = decltype(t);
    using In = decltype(in);
    whole_loss_backward<T, In>(whole, data<In>(z1), data<In>(z2), state_of<T>(operands, norm, lse, coefficients),
                               data<T>(grad_loss), data<In>(dz1), data<In>(dz2), data_if<T>(dscale, need_scale));
  });
  return {dz1, dz2, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CPU, m) {
  m.impl("whole_loss_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("whole_loss_backward_cpu", TORCH_BOX(&backward_cpu));
}

}  // namespace contrastive_ext
