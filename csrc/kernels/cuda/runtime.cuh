// What every CUDA source of batchops includes first: the CUDA runtime, checked launches, the device
// guard and shared memory. The same sources also compile with a host compiler over
// tests/emulator/cuda_emulator.h (BATCHOPS_CUDA_EMULATOR), so kernels keep to three rules:
//
//   launch("lamb_update", lamb_update<float>, blocks, 256, 0, stream, args...)   instead of <<<>>>
//   BATCHOPS_SHARED(partial, float[8][32]);                                      static shared
//   BATCHOPS_DYNAMIC_SHARED(tile, float);                                        dynamic shared
//
// What a source has for itself is in an inline namespace of the source's name: nvcc calls unnamed
// ones after the folder, and the same source would be another binary in another place.
//
// Clusters and cooperative grids are a LaunchShape. Intrinsics or runtime calls that are new to the
// project get a line in the emulator too. Host functions return null or a message (valid until the
// thread's next failure).
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

// Whether device code may use clusters. Others compile their kernels without a body for them.
#if defined(BATCHOPS_CUDA_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BATCHOPS_HAS_CLUSTERS 1
#else
#define BATCHOPS_HAS_CLUSTERS 0
#endif

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

// What a launch asks for beside its arguments.
struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;
  // Blocks of a cluster, along x: they run together and reach each other's shared memory. More than
  // one needs compute capability 9.0, more than eight may not fit any multiprocessors of a device.
  unsigned cluster = 1;
  // All blocks run together: they may wait for each other. Refused where they do not fit at once
  // (resident_blocks).
  bool cooperative = false;
};

// Sets what the runtime wants to be told of a kernel before its first such launch.
template <class... Params>
const char* allow(const char* name, void (*kernel)(Params...), const LaunchShape& shape) {
#ifdef BATCHOPS_CUDA_EMULATOR
  ::cuda_emulator::name_kernel(reinterpret_cast<const void*>(kernel), name);
#endif
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  constexpr unsigned kClusterWithoutAsking = 8;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess && shape.cluster > kClusterWithoutAsking) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return check(name, "cudaFuncSetAttribute", error);
}

// The launch's configuration; `attributes` has room for two.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, void* stream,
                                        cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return config;
}

// Launches on `stream` and checks that the launch was accepted; does not wait.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                   void* stream, Args&&... args) {
  if (const char* error = allow(name, kernel, shape)) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, stream, attributes);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error == cudaSuccess) error = cudaPeekAtLastError();
  return check(name, "launch", error);
}

// The common case: one dimension, nothing special.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
                   size_t shared_bytes, void* stream, Args&&... args) {
  if (blocks < 1 || blocks > 0x7fffffff) {
    return message("%s: a grid needs 1 to 2147483647 blocks, got %lld", name,
                   static_cast<long long>(blocks));
  }
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks), 1, 1),
                          dim3(static_cast<unsigned>(threads), 1, 1), shared_bytes};
  return launch(name, kernel, shape, stream, std::forward<Args>(args)...);
}

// How many blocks of this shape, whatever its grid, the device holds at once: the largest
// cooperative launch.
template <class... Params>
const char* resident_blocks(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                            int device, int64_t* blocks) {
  if (const char* error = allow(name, kernel, shape)) return error;
  int each = 0, multiprocessors = 0;
  const dim3 t = shape.threads;
  const char* error =
      check(name, "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                &each, kernel, static_cast<int>(t.x * t.y * t.z), shape.shared_bytes));
  if (error != nullptr) return error;
  error = check(name, "cudaDeviceGetAttribute",
                cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  *blocks = int64_t{each} * multiprocessors;
  return error;
}

// How many clusters of this shape the device holds at once; 0 where it has no room for one.
template <class... Params>
const char* resident_clusters(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                              int* clusters) {
  if (const char* error = allow(name, kernel, shape)) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, nullptr, attributes);
  return check(name, "cudaOccupancyMaxActiveClusters",
               cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
}

}  // namespace batchops::cuda
