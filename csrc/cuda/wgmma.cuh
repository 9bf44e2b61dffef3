// Products by a warpgroup: s[64, 128] = a[64, 16 kSteps] b[128, 16 kSteps]^T, 16-bit operands in shared memory, float
// accumulators in registers (PTX ISA, "Asynchronous warpgroup level matrix instructions").
//
// The instruction runs on its own after it was issued. Its registers may be neither read nor written until
// wait_for_products returns; that call takes them as operands, so that the compiler moves no use of them before it.
#pragma once

#include <cstdint>

#include "shared_layout.h"
#include "thread_rows.h"

namespace contrastive_ext {
namespace hopper {

enum class Operand { kHalf, kBfloat16 };

// clang-format off
#define CE_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CE_4(c, i) c(s[i]), c(s[i + 1]), c(s[i + 2]), c(s[i + 3])
#define CE_16(c, i) CE_4(c, i), CE_4(c, i + 4), CE_4(c, i + 8), CE_4(c, i + 12)
#define CE_ACCUMULATORS(c) CE_16(c, 0), CE_16(c, 16), CE_16(c, 32), CE_16(c, 48)
// operands 64, 65: descriptors; the last five: accumulate, signs of a and b, both with features in the fastest direction
#define CE_WGMMA(type, accumulate) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" CE_REGISTERS "}, %64, %65, p, 1, 1, 0, 0;\n}"
// clang-format on

// s = a b^T for 16 features. The old values are not read: an output, not an operand.
template <Operand kOperand>
__device__ __forceinline__ void first_step(float (&s)[kFragment], uint64_t a, uint64_t b) {
  if constexpr (kOperand == Operand::kHalf)
    asm volatile(CE_WGMMA("f16", "0") : CE_ACCUMULATORS("=f") : "l"(a), "l"(b));
  else
    asm volatile(CE_WGMMA("bf16", "0") : CE_ACCUMULATORS("=f") : "l"(a), "l"(b));
}

// s += a b^T
template <Operand kOperand>
__device__ __forceinline__ void next_step(float (&s)[kFragment], uint64_t a, uint64_t b) {
  if constexpr (kOperand == Operand::kHalf)
    asm volatile(CE_WGMMA("f16", "1") : CE_ACCUMULATORS("+f") : "l"(a), "l"(b));
  else
    asm volatile(CE_WGMMA("bf16", "1") : CE_ACCUMULATORS("+f") : "l"(a), "l"(b));
}

// Issues all features of a tile. `a` describes rows of a tile of kRowsA rows, `b` a whole tile of kRowsB rows.
template <Operand kOperand, int kFeatures, int kRowsA, int kRowsB>
__device__ __forceinline__ void issue_products(float (&s)[kFragment], uint64_t a, uint64_t b) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");  // ordinary code is done with these registers
  first_step<kOperand>(s, a, b);
#pragma unroll
  for (int step = 1; step < kFeatures / kStepFeatures; ++step)
    next_step<kOperand>(s, a + descriptor_offset(step_offset(kRowsA, step)),
                        b + descriptor_offset(step_offset(kRowsB, step)));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_products(float (&s)[kFragment]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : CE_ACCUMULATORS("+f")::"memory");
}

#undef CE_REGISTERS
#undef CE_4
#undef CE_16
#undef CE_ACCUMULATORS
#undef CE_WGMMA

}  // namespace hopper
}  // namespace contrastive_ext
