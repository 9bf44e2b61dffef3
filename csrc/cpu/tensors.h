// What operators do with tensors before a kernel sees pointers: check, allocate, unwrap.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <initializer_list>
#include <optional>

#include "../compat.h"

namespace contrastive_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

template <class T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <class T>
inline T* data_if(const Tensor& t, bool wanted) {
  return wanted ? data<T>(t) : nullptr;
}

template <class T>
inline const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// Calls body with a zero of the type kernels compute in, for a dtype checked to be one of the two.
template <class Body>
void for_float_or_double(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float)
    body(0.0f);
  else
    body(0.0);
}

// Calls body(T, In) with values of the type that computes and of the type of the inputs.
template <class Body>
inline void for_input_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(0.0f, 0.0f);
    case ScalarType::Double:
      return body(0.0, 0.0);
    case ScalarType::Half:
      return body(0.0f, c10::Half(0.0f));
    case ScalarType::BFloat16:
      return body(0.0f, c10::BFloat16(0.0f));
    default:
      STD_TORCH_CHECK(false, "inputs must be float16, bfloat16, float32 or float64.");
  }
}

inline Tensor empty_as(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline ScalarType stats_dtype(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU.");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name,
                  " has the wrong dtype: u, v, lse and their gradients share float32 or float64, ids are int64.");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous().");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && t.size(axis++) == size;
  STD_TORCH_CHECK(same, name, " has the wrong shape.");
}

inline void check_scale(double scale) { STD_TORCH_CHECK(!(scale <= 0.0), "scale must be positive; got ", scale, "."); }

inline void check_number_of_exponents(int64_t number) {
  STD_TORCH_CHECK(number == 1 || number == 2, "exponents must hold 1 or 2 numbers; got ", number, ".");
}

}  // namespace contrastive_ext
