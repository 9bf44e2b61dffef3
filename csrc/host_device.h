// One spelling for functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define CE_HOST_DEVICE __host__ __device__ __forceinline__
#define CE_UNROLL _Pragma("unroll")
#else
#define CE_HOST_DEVICE inline
#define CE_UNROLL
#endif
