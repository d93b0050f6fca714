// CUDA's device language for a host compiler: what kernels/cuda/runtime.cuh includes in place of
// cuda_runtime.h under BATCHOPS_CUDA_EMULATOR. Types, __half and __nv_bfloat16 are the toolkit's
// own; the threads are fibers (scheduler.h). A kernel that uses a new intrinsic adds it here.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "scheduler.h"

#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __launch_bounds__(...)
#ifdef BATCHOPS_EMULATOR_INSTRUMENTED  // each use of a helper is an instruction of its own
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __grid_constant__

// A shared variable is looked up in the running block by the address of a static of its own.
#define BATCHOPS_SHARED(name, ...)                                         \
  static const char name##_key = 0;                                        \
  using name##_type = typename ::cuda_emulator::TypeIs<__VA_ARGS__>::type; \
  auto& name = *static_cast<name##_type*>(                                 \
      ::cuda_emulator::current().block->static_shared(&name##_key, sizeof(name##_type), #name))
#define BATCHOPS_DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* name =                      \
      reinterpret_cast<__VA_ARGS__*>(::cuda_emulator::current().block->dynamic_shared())

#define warpSize 32

namespace cuda_emulator {

template <class T>
struct TypeIs {
  using type = T;
};

template <class T>
T shuffle(unsigned mask, T value, int source_lane, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = wait_for_warp(Collective::shuffle, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(current().lane()); }

}  // namespace cuda_emulator

// The signature of cuda_runtime.h's template of that name. The grid has run when it returns.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  std::tuple<std::remove_cv_t<Params>...> copies(std::forward<Args>(args)...);
  cuda_emulator::Grid grid;
  grid.kernel = cuda_emulator::take_launch_name();
  grid.blocks = config->gridDim;
  grid.threads = config->blockDim;
  grid.dynamic_shared = config->dynamicSmemBytes;
  grid.stream = config->stream;
  grid.body = [&] { std::apply(kernel, copies); };
  cuda_emulator::run(grid);
  return cudaSuccess;
}

using cuda_emulator::Site;

inline void __syncthreads(Site site = Site::current()) { cuda_emulator::wait_for_block(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::current()) {
  cuda_emulator::wait_for_warp(cuda_emulator::Collective::sync, mask, 0, 0, site);
}

// `width` cuts the warp into segments; a source outside the segment leaves the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Site site = Site::current()) {
  const int segment = cuda_emulator::lane() & ~(width - 1);
  return cuda_emulator::shuffle(mask, value, segment + (source & (width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane + static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return cuda_emulator::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, inside ? lane - static_cast<int>(delta) : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane ^ lane_mask;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return cuda_emulator::shuffle(mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<unsigned>(cuda_emulator::wait_for_warp(cuda_emulator::Collective::ballot, mask,
                                                            predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// Threads take turns on one host thread: plain operations are atomic and ordered.
template <class T>
EMULATOR_UNSEEN T atomicAdd(T* address, std::type_identity_t<T> value) {
  if (auto* o = cuda_emulator::observer()) {
    o->atomic({address, sizeof(T), true, true, cuda_emulator::MemoryOrder::relaxed,
               cuda_emulator::Scope::device, __builtin_return_address(0)});
  }
  const T before = *address;
  *address = before + value;
  return before;
}
inline void __threadfence() {
  if (auto* o = cuda_emulator::observer()) o->fence(cuda_emulator::Scope::device);
}
inline void __threadfence_block() {
  if (auto* o = cuda_emulator::observer()) o->fence(cuda_emulator::Scope::block);
}

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
