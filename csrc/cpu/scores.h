// The tile products, one library GEMM each, on views of memory we own.
//
// The views are torch tensors over raw pointers: that is the only matrix product the stable ABI offers, and it costs
// about a microsecond per product. Called inside parallel_for the library runs it on the calling thread alone.
#pragma once

#include <memory>

#include "../compat.h"

namespace contrastive_ext {

template <class T>
inline int32_t aoti_dtype();
template <>
inline int32_t aoti_dtype<float>() {
  return aoti_torch_dtype_float32();
}
template <>
inline int32_t aoti_dtype<double>() {
  return aoti_torch_dtype_float64();
}

// A [rows, cols] matrix over borrowed memory.
template <class T>
class MatrixView {
 public:
  MatrixView(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1) {
    const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<T*>(data), 2, sizes, strides, 0, aoti_dtype<T>(), aoti_torch_device_type_cpu(), 0, &handle_));
  }
  ~MatrixView() { aoti_torch_delete_tensor_object(handle_); }
  MatrixView(const MatrixView&) = delete;
  MatrixView& operator=(const MatrixView&) = delete;

  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// out = scale a b, or out += a b. Nothing is read from `out` unless it accumulates.
template <class T>
inline void multiply(const MatrixView<T>& out, const MatrixView<T>& a, const MatrixView<T>& b, bool accumulate,
                     double scale = 1.0) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), accumulate ? 1.0 : 0.0, scale));
}

// Logits: s[rows, cols] = scale u[rows, d] v[cols, d]^T
template <class T>
inline void score_tile(T* s, int64_t ld, double scale, const T* u, int64_t rows, const T* v, int64_t cols, int64_t d) {
  multiply<T>({s, rows, cols, ld}, {u, rows, d, d}, {v, d, cols, 1, d}, /*accumulate=*/false, scale);
}

// out[rows, d] (+)= w[rows, cols] v[cols, d]
template <class T>
inline void combine_columns(T* out, const T* w, int64_t ld, int64_t rows, const T* v, int64_t cols, int64_t d,
                            bool accumulate) {
  multiply<T>({out, rows, d, d}, {w, rows, cols, ld}, {v, cols, d, d}, accumulate);
}

// out[cols, d] (+)= w[rows, cols]^T u[rows, d]
template <class T>
inline void combine_rows(T* out, const T* w, int64_t ld, int64_t rows, const T* u, int64_t cols, int64_t d,
                         bool accumulate) {
  multiply<T>({out, cols, d, d}, {w, cols, rows, 1, ld}, {u, rows, d, d}, accumulate);
}

// Uninitialised, cache-line aligned workspace.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t size)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(size > 0 ? size : 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace contrastive_ext
