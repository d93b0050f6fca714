// What every CUDA source of batchops includes first: the CUDA runtime, checked launches, the device
// guard and shared memory. The same sources also compile with a host compiler over
// tests/emulator/cuda_emulator.h (BATCHOPS_CUDA_EMULATOR), so kernels keep to three rules:
//
//   launch("lamb_update", lamb_update<float>, blocks, 256, 0, stream, args...)   instead of <<<>>>
//   BATCHOPS_SHARED(partial, float[8][32]);                                      static shared
//   memory BATCHOPS_DYNAMIC_SHARED(tile, float);                                        dynamic
//   shared memory
//
// and intrinsics or runtime calls that are new to the project get a line in the emulator too. Host
// functions return null or a message (valid until the thread's next failure).
#pragma once
#ifdef BATCHOPS_CUDA_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <utility>

#include "kernels/common.h"

#define BATCHOPS_DEVICE __device__ __forceinline__

#ifndef BATCHOPS_CUDA_EMULATOR
#define BATCHOPS_SHARED(name, ...) \
  __shared__ typename ::batchops::cuda::TypeIs<__VA_ARGS__>::type name
#define BATCHOPS_DYNAMIC_SHARED(name, ...)                                       \
  extern __shared__ __align__(16) unsigned char batchops_dynamic_shared_bytes[]; \
  __VA_ARGS__* name = reinterpret_cast<__VA_ARGS__*>(batchops_dynamic_shared_bytes)
#endif

namespace batchops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct TypeIs {
  using type = T;
};

__attribute__((format(printf, 1, 2))) inline const char* message(const char* format, ...) {
  thread_local char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

// Null on success. Clears the runtime's own error, which would otherwise surface in the next call.
inline const char* check(const char* operation, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return message("%s: %s failed: %s (%s)", operation, call, cudaGetErrorString(error),
                 cudaGetErrorName(error));
}

// This runtime is linked statically and keeps a current device of its own, beside the framework's.
// So each entry point sets the device that the caller has made current there. It is not put back
// afterwards: both runtimes share the driver's current context, and restoring what this one
// remembers could pull the context from under the framework.
inline const char* set_device(const char* operation, int device) {
  return check(operation, "cudaSetDevice", cudaSetDevice(device));
}

// Launches on `stream` and checks that the launch was accepted; does not wait.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
                   size_t shared_bytes, void* stream, Args&&... args) {
  if (blocks < 1 || blocks > 0x7fffffff) {
    return message("%s: a grid needs 1 to 2147483647 blocks, got %lld", name,
                   static_cast<long long>(blocks));
  }
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    const char* error = check(name, "cudaFuncSetAttribute",
                              cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes)));
    if (error != nullptr) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
#ifdef BATCHOPS_CUDA_EMULATOR
  ::cuda_emulator::name_next_launch(name);
#endif
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error == cudaSuccess) error = cudaPeekAtLastError();
  return check(name, "launch", error);
}

}  // namespace batchops::cuda
