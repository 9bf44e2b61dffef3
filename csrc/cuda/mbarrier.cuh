// Barriers in shared memory that count arrivals and bytes (PTX ISA, "mbarrier"), and barriers by number.
#pragma once

#include <cstdint>

namespace contrastive_ext {
namespace hopper {

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Between init_barrier and __syncthreads: TMA, which works in the async proxy, must see the initialised barriers.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and keeps the phase open until that many bytes have come.
__device__ __forceinline__ void arrive_expecting(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of that parity is over. try_wait sleeps for a while in hardware before it answers no.
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Barriers by number, a constant: a register would claim all sixteen. Number 0 belongs to __syncthreads.
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_at() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}
template <int kNumber, int kThreads>
__device__ __forceinline__ void arrive_at() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// Turns of two warpgroups: one arrives on the other's barrier, which takes both its arrivals and the other's wait, 256
// threads. They order nothing in memory, only who issues its products first.
__device__ __forceinline__ void wait_for_turn(int warpgroup) {
  if (warpgroup == 0)
    sync_at<1, 256>();
  else
    sync_at<2, 256>();
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  if (warpgroup == 0)
    arrive_at<1, 256>();
  else
    arrive_at<2, 256>();
}

// Sums that the first warpgroup leaves for the second, of two tiles by turns: these do order memory.
__device__ __forceinline__ void sums_are_left(int turn) {
  if (turn == 0)
    arrive_at<3, 256>();
  else
    arrive_at<4, 256>();
}
__device__ __forceinline__ void wait_for_sums(int turn) {
  if (turn == 0)
    sync_at<3, 256>();
  else
    sync_at<4, 256>();
}

}  // namespace hopper
}  // namespace contrastive_ext
