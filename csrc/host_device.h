// One spelling for functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define CE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CE_HOST_DEVICE inline
#endif

#if defined(__CUDA_ARCH__)  // host compilers, nvcc's too, do not know the pragma
#define CE_UNROLL _Pragma("unroll")
#else
#define CE_UNROLL
#endif
