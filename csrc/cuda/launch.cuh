// Launches of sweeps: which instance, what TMA has to know, shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "shape.h"
#include "tensor_map.h"
#include "wgmma.cuh"
#include "work.h"

namespace contrastive_ext {
namespace hopper {

// Null or what the last launch says.
inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Launch<operand, features>::run(arguments ...) for one of the sizes there are.
template <template <Operand, int> class Launch, class... Arguments>
const char* launch_instance(int features, bool bfloat16, Arguments&&... arguments) {
  const auto run = [&](auto size) {
    if (bfloat16) return Launch<Operand::kBfloat16, size.value>::run(std::forward<Arguments>(arguments)...);
    return Launch<Operand::kHalf, size.value>::run(std::forward<Arguments>(arguments)...);
  };
  switch (features) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
    case 256:
      return run(std::integral_constant<int, 256>{});
    default:
      return "there are kernels for 64, 128 and 256 features.";
  }
}

// kernel<<<...>>>(arguments, tensor map of u [n, features], tensor map of v [m, features]). Null or what went wrong.
template <class Shape, Operand kOperand, class Kernel, class Arguments>
const char* launch_sweep(Kernel* kernel, int threads, const void* u, int64_t n, const void* v, int64_t m, int splits,
                         cudaStream_t stream, const Arguments& arguments) {
  constexpr bool kIsBfloat16 = kOperand == Operand::kBfloat16;
  CUtensorMap u_map, v_map;
  const char* error = describe_matrix(&u_map, u, n, Shape::kFeatures, kIsBfloat16, kRows);
  if (!error) error = describe_matrix(&v_map, v, m, Shape::kFeatures, kIsBfloat16, Shape::kColumns);
  if (error) return error;
  constexpr int kBytes = kSharedBytes<Shape>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  kernel<<<PlainGrid::of(number_of_tiles(n, kRows), splits), threads, kBytes, stream>>>(arguments, u_map, v_map);
  return launch_error();
}

}  // namespace hopper
}  // namespace contrastive_ext
