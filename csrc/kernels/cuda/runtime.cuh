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
#include <map>
#include <mutex>
#include <set>
#include <tuple>
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

// The compiler keeps what is read and written before from what comes after: also behind
// __pipeline_wait_prior, which does not tell it that there is something new to read.
BATCHOPS_DEVICE void keep_order() {
#ifndef BATCHOPS_CUDA_EMULATOR
  asm volatile("" ::: "memory");
#endif
}

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
// remembers could pull the context from under the framework. Where the device is current already,
// its context may be another than the primary one (a green context), which setting it would
// replace.
inline const char* set_device(const char* operation, int device) {
  int current = -1;
  if (const char* error = check(operation, "cudaGetDevice", cudaGetDevice(&current))) return error;
  if (current == device) return nullptr;
  return check(operation, "cudaSetDevice", cudaSetDevice(device));
}

// While it lives, calls of this thread neither break off what is captured nor are refused for it:
// the first use of a device or a kernel asks and loads.
class BesideCaptures {
#ifndef BATCHOPS_CUDA_EMULATOR
 public:
  BesideCaptures() { exchange(); }
  ~BesideCaptures() { exchange(); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
#endif
};

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

// What the runtime keeps of a kernel on a device, and wants to be told before the first launch that
// goes past it. It is told once, and all there is: another thread may be about to launch the same
// kernel, which must not find less than it asked for.
//
//   shared    dynamic shared memory beyond 48 KB, less what the kernel declares as static
//   clusters  of more than eight blocks
class Allowances {
 public:
  static Allowances& instance() {
    static Allowances* const all = new Allowances;  // until the process has ended
    return *all;
  }
  cudaError_t shared(const void* kernel) {
    return once({kernel, current(), false}, [&] {
      int most = 0;
      cudaFuncAttributes attributes{};
      cudaError_t error =
          cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, current());
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
      if (error != cudaSuccess) return error;
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - static_cast<int>(attributes.sharedSizeBytes));
      if (error != cudaSuccess) return error;
      // Of what a multiprocessor has for its cache and for this: as many blocks are meant to run.
      return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
    });
  }
  // A context of its own on the same device may not have heard of it.
  void forget(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    told_.erase({kernel, current(), false});
    told_.erase({kernel, current(), true});
  }
  cudaError_t clusters(const void* kernel) {
    return once({kernel, current(), true}, [&] {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    });
  }

 private:
  using Key = std::tuple<const void*, int, bool>;

  static int current() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess ? device : 0;
  }
  template <class Tell>
  cudaError_t once(const Key& key, Tell&& tell) {
    const std::lock_guard<std::mutex> lock(mutex_);
#ifndef BATCHOPS_CUDA_EMULATOR  // whose device tests change
    if (told_.count(key) != 0) return cudaSuccess;
#endif
    [[maybe_unused]] const BesideCaptures guard;
    const cudaError_t error = tell();
    if (error == cudaSuccess) told_.insert(key);
    return error;
  }

  std::mutex mutex_;
  std::set<Key> told_;
};

template <class... Params>
cudaError_t allow(const char* name, void (*kernel)(Params...), const LaunchShape& shape) {
#ifdef BATCHOPS_CUDA_EMULATOR
  ::cuda_emulator::name_kernel(reinterpret_cast<const void*>(kernel), name);
#else
  static_cast<void>(name);
#endif
  constexpr unsigned kClusterWithoutAsking = 8;
  const void* function = reinterpret_cast<const void*>(kernel);
  // However little it is: static shared memory counts as well.
  cudaError_t error =
      shape.shared_bytes > 0 ? Allowances::instance().shared(function) : cudaSuccess;
  if (error == cudaSuccess && shape.cluster > kClusterWithoutAsking) {
    error = Allowances::instance().clusters(function);
  }
  return error;
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

// Launches on `stream`; does not wait. What the runtime says of it stays with the runtime too.
template <class... Params, class... Args>
cudaError_t try_launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                       void* stream, Args&&... args) {
  cudaError_t error = allow(name, kernel, shape);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, stream, attributes);
  error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaErrorInvalidValue && (shape.shared_bytes > 0 || shape.cluster > 1)) {
    static_cast<void>(cudaGetLastError());
    Allowances::instance().forget(reinterpret_cast<const void*>(kernel));
    error = allow(name, kernel, shape);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  return error == cudaSuccess ? cudaPeekAtLastError() : error;
}

// Whether a launch was refused because its blocks do not run together: those of a cooperative grid,
// or of a cluster.
inline bool lacks_room(const LaunchShape& shape, cudaError_t error) {
  constexpr int kInvalidClusterSize = 912;  // has its name from CUDA 12 on
  if (shape.cluster > 1 &&
      (static_cast<int>(error) == kInvalidClusterSize || error == cudaErrorLaunchOutOfResources)) {
    return true;
  }
  return (shape.cluster > 1 || shape.cooperative) &&
         (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported);
}

// The same, and checks that the launch was accepted.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                   void* stream, Args&&... args) {
  return check(name, "launch",
               try_launch(name, kernel, shape, stream, std::forward<Args>(args)...));
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

// What ask(found) says of a key, asked until it has once succeeded.
template <class Key, class Value, class Ask>
const char* asked_once([[maybe_unused]] const Key& key, Value& found, Ask ask) {
#ifdef BATCHOPS_CUDA_EMULATOR  // whose device tests change
  return ask(found);
#else
  static std::mutex mutex;
  static auto* const known = new std::map<Key, Value>;  // until the process has ended
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto place = known->find(key); place != known->end()) {
    found = place->second;
    return nullptr;
  }
  const BesideCaptures guard;
  const char* error = ask(found);
  if (error == nullptr) known->emplace(key, found);
  return error;
#endif
}

// How many blocks of this shape, whatever its grid, the device holds at once: the largest
// cooperative launch.
template <class... Params>
const char* resident_blocks(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                            int device, int64_t* blocks) {
  const std::tuple key{reinterpret_cast<const void*>(kernel), device, shape.threads.x,
                       shape.shared_bytes};
  return asked_once(key, *blocks, [&](int64_t& found) -> const char* {
    const char* error = check(name, "cudaFuncSetAttribute", allow(name, kernel, shape));
    if (error != nullptr) return error;
    int each = 0, multiprocessors = 0;
    const dim3 t = shape.threads;
    error = check(name, "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
                  cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                      &each, kernel, static_cast<int>(t.x * t.y * t.z), shape.shared_bytes));
    if (error != nullptr) return error;
    error = check(name, "cudaDeviceGetAttribute",
                  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    found = int64_t{each} * multiprocessors;
    return error;
  });
}

// How many clusters of this shape the device holds at once; 0 where it has no room for one.
template <class... Params>
const char* resident_clusters(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                              int* clusters) {
  const char* error = check(name, "cudaFuncSetAttribute", allow(name, kernel, shape));
  if (error != nullptr) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, nullptr, attributes);
  return check(name, "cudaOccupancyMaxActiveClusters",
               cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
}

}  // namespace batchops::cuda
