// Counters in global memory by which blocks learn of each other. What the block of the thread that
// releases has seen before a barrier is seen by who acquires its count, or a later one, and by
// those whom that one meets at a barrier.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

// Releases, and waits for no answer.
BATCHOPS_DEVICE void count_one(unsigned* counter) {
#ifdef BATCHOPS_CUDA_EMULATOR
  __nv_atomic_fetch_add(counter, 1u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;"
               :
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
#endif
}
// Releases; the count before.
BATCHOPS_DEVICE unsigned add_one(unsigned* counter) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return __nv_atomic_fetch_add(counter, 1u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
#else
  unsigned before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#endif
}
// Releases.
BATCHOPS_DEVICE void set_one(unsigned* counter) {
#ifdef BATCHOPS_CUDA_EMULATOR
  __nv_atomic_store_n(counter, 1u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
#else
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
               : "memory");
#endif
}
BATCHOPS_DEVICE unsigned acquired(const unsigned* counter) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return __nv_atomic_load_n(counter, __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE);
#else
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(count)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return count;
#endif
}
// Without the acquire, which would empty the L1 cache each time.
BATCHOPS_DEVICE unsigned glimpsed(const unsigned* counter) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return __nv_atomic_load_n(counter, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
#else
  unsigned count;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(count)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return count;
#endif
}
// Acquires, once the count is there. By one thread; a barrier of those that go on follows.
BATCHOPS_DEVICE void wait_for(const unsigned* counter, unsigned count) {
  while (glimpsed(counter) < count) __nanosleep(64);
  acquired(counter);
}

}  // namespace batchops::cuda
