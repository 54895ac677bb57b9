/* How the warps of a block on Hopper wait for each other and for other blocks: barriers in shared memory (mbarrier),
 * which count arrivals and change their parity when all have come; flags in global memory; registers that one warpgroup
 * gives up for another.
 *
 * A wait is one piece of assembly, so that to the compiler no branches meet where products of wgmma are running. */
#ifndef FLAP_KERNELS_CUDA_BARRIERS_CUH
#define FLAP_KERNELS_CUDA_BARRIERS_CUH

#include <stdint.h>

constexpr uint32_t BARRIER_BYTES = 8;

__device__ __forceinline__ void barrier_open(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

/* Arrivals of a warp. Racecheck follows barriers from thread to thread, and cannot see that one lane arrives for all
 * behind __syncwarp, which is no instruction where a warp is converged: for it each lane arrives (FLAP_LANES_ARRIVE).
 */
#ifdef FLAP_LANES_ARRIVE
constexpr uint32_t WARP_ARRIVALS = 32;
#else
constexpr uint32_t WARP_ARRIVALS = 1;
#endif

/* Once what all lanes of the warp did before is done. */
__device__ __forceinline__ void barrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (WARP_ARRIVALS == 32 || (threadIdx.x & 31) == 0)
    barrier_arrive(barrier);
}

/* One arrival of this thread, once all copies that it has started (cp.async) are over. */
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

/* One arrival, and so many bytes to come by copies. */
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Until the phase of that parity is over; of a new barrier, the phase before the first (parity 1) is. */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nagain:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n}\n" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

/* All of `threads` threads, whose number is whole warps; 0 is the barrier of __syncthreads. */
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

/* What this thread wrote to shared memory becomes visible to wgmma. */
__device__ __forceinline__ void shared_writes_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/* ---- between the blocks of a cluster ---- */

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

/* The same barrier in thread block `rank` of the cluster. */
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
               "r"(rank)
               : "memory");
}

/* ---- between all blocks ---- */

__device__ __forceinline__ uint32_t flag_read(const uint32_t *flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/* With all that this thread did, or saw done by others of its block, before. */
__device__ __forceinline__ void flag_write(uint32_t *flag, uint32_t value) {
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%0], %1;\n" ::"l"(flag), "r"(value) : "memory");
}

/* Four additions where the value lives; nothing comes back. */
__device__ __forceinline__ void add_to_global(float4 *to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

/* ---- registers of a warpgroup ---- */

template <int COUNT> __device__ __forceinline__ void registers_give_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

#endif
