// Who multiplies: our kernels, but the library's product where that has units which compilers do not (Apple's matrix
// coprocessor, behind Accelerate).
#pragma once

#include "tile.h"

#if defined(__APPLE__)
#define CE_LIBRARY_PRODUCTS 1
#endif

#if defined(CE_LIBRARY_PRODUCTS)
#include "../compat.h"
#endif

namespace contrastive_ext {

#if !defined(CE_LIBRARY_PRODUCTS)

constexpr int64_t kPanel = kColumnPad;  // columns side by side in memory

template <class T>
inline void multiply(const Product<T>& p) {
  tile_kernels<T>().product(p);
}

#else

constexpr int64_t kPanel = 512;  // a whole tile in one product: it costs some microseconds to ask for one

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

// A [rows, cols] matrix over borrowed memory, as the stable ABI wants it.
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

// Called inside parallel_for the library runs it on the calling thread alone.
template <class T>
inline void multiply(const Product<T>& p) {
  const MatrixView<T> c(p.c, p.rows, p.cols, p.c_row), a(p.a, p.rows, p.depth, p.a_row, p.a_depth),
      b(p.b, p.depth, p.cols, p.b_depth);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), p.accumulate ? 1.0 : 0.0, p.scale));
}

#endif

}  // namespace contrastive_ext
