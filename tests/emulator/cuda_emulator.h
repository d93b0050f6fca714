// CUDA's device language for a host compiler: what kernels/cuda/runtime.cuh includes in place of
// cuda_runtime.h under BATCHOPS_CUDA_EMULATOR. Types, __half and __nv_bfloat16 are the toolkit's
// own; the threads are fibers (scheduler.h). A kernel that uses a new intrinsic adds it here or in
// a header below. cooperative_groups.h and cuda_pipeline_primitives.h of this folder take the place
// of the toolkit's.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>

#include "atomics.h"
#include "clusters.h"
#include "collectives.h"
#include "kernel.h"
#include "launch.h"
#include "nv_atomics.h"
#include "scheduler.h"

#undef __launch_bounds__
#undef __cluster_dims__
#undef __forceinline__
#undef __grid_constant__
// The most threads of a block are kept as that many no-operations before the function's code, where
// kernel.cpp finds them again.
#define __launch_bounds__(...) \
  __attribute__((              \
      patchable_function_entry(EMULATOR_FIRST(__VA_ARGS__, 0), EMULATOR_FIRST(__VA_ARGS__, 0))))
#define EMULATOR_FIRST(first, ...) (first)
// A launch says the size of its clusters; on a kernel it could not be found again.
#define __cluster_dims__(...) emulator_wants_clusters_as_a_launch_attribute
#ifdef BATCHOPS_EMULATOR_INSTRUMENTED  // each use of a helper is an instruction of its own
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __grid_constant__

// A shared variable is looked up in the running block by a static of its own.
#define BATCHOPS_SHARED(name, ...)                                         \
  static ::cuda_emulator::SharedKey name##_key{#name};                     \
  using name##_type = typename ::cuda_emulator::TypeIs<__VA_ARGS__>::type; \
  auto& name = *static_cast<name##_type*>(                                 \
      ::cuda_emulator::shared_variable(name##_key, sizeof(name##_type), alignof(name##_type)))
#define BATCHOPS_DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* name =                      \
      reinterpret_cast<__VA_ARGS__*>(::cuda_emulator::current().block->dynamic_shared())

#define warpSize 32

namespace cuda_emulator {

template <class T>
struct TypeIs {
  using type = T;
};

inline void* shared_variable(SharedKey& key, size_t bytes, size_t alignment,
                             const Site& site = Site::current()) {
  return current().block->static_shared(key, bytes, alignment, site);
}

}  // namespace cuda_emulator

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Compile with -ffp-contract=off: then these round once each, as on the device.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
