// What TMA has to know of a matrix. The driver encodes it; the runtime finds the driver's function, so that nothing
// links libcuda and the library loads on machines without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "shared_layout.h"

namespace contrastive_ext {
namespace hopper {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, or null.
inline EncodeTiled find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
}

// A row-major matrix [rows, features] of 16-bit numbers, read in boxes of box_rows x 64 features, zeros outside.
// Returns null or what went wrong.
inline const char* describe_matrix(CUtensorMap* map, const void* data, int64_t rows, int features, bool bfloat16,
                                   int box_rows) {
  static const EncodeTiled encode = find_encoder();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled (CUDA 12.0).";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(features), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(features) * 2};  // bytes, of all but the first dimension
  const cuuint32_t box[] = {kBoxFeatures, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult status =
      encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the matrix (is it 16-byte aligned?).";
}

}  // namespace hopper
}  // namespace contrastive_ext
