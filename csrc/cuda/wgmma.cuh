// Products by a warpgroup, 16-bit operands and float accumulators in registers (PTX ISA, "Asynchronous warpgroup level
// matrix instructions"):
//
//   scores  s[64, kColumns]  = u[64, kFeatures] v[kColumns, kFeatures]^T   both in shared memory
//   sums    o[64, kFeatures] += w[64, kColumns] v[kColumns, kFeatures]     w in registers, the same tile v
//
// An instruction runs on its own after it was issued. Its registers may be neither read nor written until
// wait_for_products returns; that call takes them as operands, so that the compiler moves no use of them before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "shared_layout.h"

namespace contrastive_ext {
namespace hopper {

enum class Operand { kHalf, kBfloat16 };

// One instruction m64nNk16 for each number of accumulators, N / 2: of both operands in shared memory, without reading
// the old values (an output, not an operand) or adding to them, and with a in registers. The last numbers are signs of
// a and b and whether a and b are MN-major.
// clang-format off
#define CE_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CE_NAMES_64 CE_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CE_NAMES_128 CE_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CE_4(c, i) c(s[i]), c(s[i + 1]), c(s[i + 2]), c(s[i + 3])
#define CE_16(c, i) CE_4(c, i), CE_4(c, i + 4), CE_4(c, i + 8), CE_4(c, i + 12)
#define CE_OPERANDS_32(c) CE_16(c, 0), CE_16(c, 16)
#define CE_OPERANDS_64(c) CE_OPERANDS_32(c), CE_16(c, 32), CE_16(c, 48)
#define CE_OPERANDS_128(c) CE_OPERANDS_64(c), CE_16(c, 64), CE_16(c, 80), CE_16(c, 96), CE_16(c, 112)
#define CE_WGMMA(n, type, accumulators, a, b, accumulate, tail) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" accumulators "}, " a ", " b ", p, 1, 1, " tail ";\n}"
#define CE_INSTRUCTIONS(n, half, op0, op1, op2, op3, op4) \
  template <Operand kOperand> \
  __device__ __forceinline__ void first_scores(float (&s)[half], uint64_t a, uint64_t b) { \
    if constexpr (kOperand == Operand::kHalf) \
      asm volatile(CE_WGMMA(n, "f16", CE_NAMES_##half, op0, op1, "0", "0, 0") : CE_OPERANDS_##half("=f") : "l"(a), "l"(b)); \
    else \
      asm volatile(CE_WGMMA(n, "bf16", CE_NAMES_##half, op0, op1, "0", "0, 0") : CE_OPERANDS_##half("=f") : "l"(a), "l"(b)); \
  } \
  template <Operand kOperand> \
  __device__ __forceinline__ void more_scores(float (&s)[half], uint64_t a, uint64_t b) { \
    if constexpr (kOperand == Operand::kHalf) \
      asm volatile(CE_WGMMA(n, "f16", CE_NAMES_##half, op0, op1, "1", "0, 0") : CE_OPERANDS_##half("+f") : "l"(a), "l"(b)); \
    else \
      asm volatile(CE_WGMMA(n, "bf16", CE_NAMES_##half, op0, op1, "1", "0, 0") : CE_OPERANDS_##half("+f") : "l"(a), "l"(b)); \
  } \
  template <Operand kOperand> \
  __device__ __forceinline__ void more_sums(float (&s)[half], const uint32_t* a, uint64_t b) { \
    if constexpr (kOperand == Operand::kHalf) \
      asm volatile(CE_WGMMA(n, "f16", CE_NAMES_##half, "{" op0 ", " op1 ", " op2 ", " op3 "}", op4, "1", "1") \
                   : CE_OPERANDS_##half("+f") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    else \
      asm volatile(CE_WGMMA(n, "bf16", CE_NAMES_##half, "{" op0 ", " op1 ", " op2 ", " op3 "}", op4, "1", "1") \
                   : CE_OPERANDS_##half("+f") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
// clang-format on

CE_INSTRUCTIONS("64", 32, "%32", "%33", "%34", "%35", "%36")
CE_INSTRUCTIONS("128", 64, "%64", "%65", "%66", "%67", "%68")
CE_INSTRUCTIONS("256", 128, "%128", "%129", "%130", "%131", "%132")

#undef CE_NAMES_32
#undef CE_NAMES_64
#undef CE_NAMES_128
#undef CE_4
#undef CE_16
#undef CE_OPERANDS_32
#undef CE_OPERANDS_64
#undef CE_OPERANDS_128
#undef CE_WGMMA
#undef CE_INSTRUCTIONS

// Ordinary code is done with the registers of the products that follow.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Issues steps [kBegin, kEnd) of 16 features of s = u v^T: `u` is k_major rows in a tile of kRowsOfU, `v` a whole tile,
// k_major.
template <Operand kOperand, int kRowsOfU, int kBegin, int kEnd, int kLogits>
__device__ __forceinline__ void multiply_features(float (&s)[kLogits], uint32_t u, uint32_t v) {
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step) {
    const uint64_t a = matrix_descriptor(u + descriptor_offset(step_offset(kRowsOfU, step)));
    const uint64_t b = matrix_descriptor(v + descriptor_offset(step_offset(/*rows=*/2 * kLogits, step)));
    if (step == 0)
      first_scores<kOperand>(s, a, b);
    else
      more_scores<kOperand>(s, a, b);
  }
}

// Issues o += w v: `w` as pack leaves it, `v` a whole tile, mn_major.
template <Operand kOperand, int kSums, int kWeights>
__device__ __forceinline__ void add_products(float (&o)[kSums], const uint32_t (&w)[kWeights], uint32_t v) {
#pragma unroll
  for (int step = 0; step < kWeights / 4; ++step)
    more_sums<kOperand>(o, w + 4 * step, matrix_descriptor(v + descriptor_offset(row_step_offset(step))));
}

// Two weights in 16 bits, the first one in the lower half.
template <Operand kOperand>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  if constexpr (kOperand == Operand::kHalf) {
    const __half2 both = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// Accumulators of a product [64, 2 kLogits] as the operand `w` of one: value 2 g + h holds columns column + 8 g and the
// next of row row + 8 h (see Fragment), and four of them are the 16 columns of a step.
template <Operand kOperand, int kLogits>
__device__ __forceinline__ void pack(uint32_t (&w)[kLogits / 2], const float (&s)[kLogits]) {
#pragma unroll
  for (int k = 0; k < kLogits / 2; ++k) w[k] = pack<kOperand>(s[2 * k], s[2 * k + 1]);
}

// The compiler may take these registers for changed here.
template <int kCount>
__device__ __forceinline__ void touch(float (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) asm volatile("" : "+f"(x[k])::"memory");
}
template <int kCount>
__device__ __forceinline__ void touch(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) asm volatile("" : "+r"(x[k])::"memory");
}

// Until all groups of products but the last one are over.
__device__ __forceinline__ void wait_for_earlier_products() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// Until all products are over; takes the registers of all of them, also the weights they read.
template <class... Registers>
__device__ __forceinline__ void wait_for_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  (touch(registers), ...);
}

}  // namespace hopper
}  // namespace contrastive_ext
