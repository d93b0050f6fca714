// Stand-ins for the CUDA runtime's host calls that the kernels' launch code makes, apart from
// streams and events (streams.cpp).
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "host_call.h"
#include "kernel.h"
#include "observer.h"
#include "settings.h"
#include "streams.h"

using cuda_emulator::Error;
using cuda_emulator::refuse_call;
using cuda_emulator::settings;

namespace {

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr ErrorText kTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "cluster misconfiguration"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
     "too many blocks in cooperative launch"},
};

const ErrorText& text_of(cudaError_t error) {
  static constexpr ErrorText kUnknown{cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const ErrorText& entry : kTexts) {
    if (entry.error == error) return entry;
  }
  return kUnknown;
}

}  // namespace

extern "C" {

// Errors come back from the call that makes them and stay with nobody.
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }
const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings().compute_major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(settings().shared_limit);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(settings().shared_limit + cuda_emulator::kSharedReservedPerBlock);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(cuda_emulator::kSharedWithoutAsking);
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = cuda_emulator::kThreadsPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = cuda_emulator::kBlocksPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
    case cudaDevAttrMaxRegistersPerBlock:
      *value = cuda_emulator::kRegistersPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 * 1024 * 1024;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    default:
      return refuse_call(cudaErrorInvalidValue, __func__,
                         "attribute " + std::to_string(static_cast<int>(attribute)) +
                             " is unknown to the emulator");
  }
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  cuda_emulator::Kernel& kernel = cuda_emulator::kernel_of(function);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 ||
          kernel.static_shared + static_cast<size_t>(value) > settings().shared_limit) {
        cuda_emulator::refuse(
            function, "cudaFuncSetAttribute: too much shared memory: " + std::to_string(value) +
                          " bytes beside " + std::to_string(kernel.static_shared) +
                          " static, the limit is " + std::to_string(settings().shared_limit));
      }
      kernel.asked_shared = static_cast<size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      kernel.wide_clusters = value != 0;
      return cudaSuccess;
    default:
      return refuse_call(cudaErrorInvalidValue, __func__,
                         kernel.name + ": attribute " +
                             std::to_string(static_cast<int>(attribute)) +
                             " is unknown to the emulator");
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const cuda_emulator::Kernel& kernel = cuda_emulator::kernel_of(function);
  *attributes = {};
  attributes->maxThreadsPerBlock = kernel.max_threads > 0 ? kernel.max_threads : 1024;
  attributes->numRegs = kernel.registers;
  attributes->sharedSizeBytes = kernel.static_shared;
  attributes->maxDynamicSharedSizeBytes =
      static_cast<int>(kernel.most_shared() - kernel.static_shared);
  const int device = settings().compute_major * 10;
  attributes->ptxVersion = settings().code_version > 0 ? settings().code_version : device;
  attributes->binaryVersion = device;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t dynamic_shared) {
  const cuda_emulator::Kernel& kernel = cuda_emulator::kernel_of(function);
  if (threads < 1 || threads > cuda_emulator::kThreadsPerBlock) {
    return refuse_call(cudaErrorInvalidValue, __func__,
                       kernel.name + ": block of " + std::to_string(threads) +
                           " threads, expected 1 to " +
                           std::to_string(cuda_emulator::kThreadsPerBlock));
  }
  *blocks = cuda_emulator::blocks_per_multiprocessor(kernel, threads, dynamic_shared);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    size = attribute.val.clusterDim.x * attribute.val.clusterDim.y * attribute.val.clusterDim.z;
  }
  const cuda_emulator::Kernel& kernel = cuda_emulator::kernel_of(function);
  if (size < 1 || size > cuda_emulator::most_blocks_of_cluster(kernel)) {
    return refuse_call(cudaErrorInvalidClusterSize, __func__,
                       kernel.name + ": clusters of " + std::to_string(size) +
                           " blocks, expected 1 to " +
                           std::to_string(cuda_emulator::most_blocks_of_cluster(kernel)));
  }
  const dim3 threads = config->blockDim;
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, function, static_cast<int>(threads.x * threads.y * threads.z),
      config->dynamicSmemBytes);
  *clusters = blocks * settings().multiprocessors / static_cast<int>(size);
  return error;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return cuda_emulator::submit(__func__, stream, [=] {
    if (auto* o = cuda_emulator::observer()) {
      o->memory_operation(data, nullptr, bytes, cuda_emulator::running_work());
    }
    std::memset(data, value, bytes);
  });
}

// As from page-locked memory: the source is read when the stream comes to it.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return cuda_emulator::submit(__func__, stream, [=] {
    if (auto* o = cuda_emulator::observer()) {
      o->memory_operation(to, from, bytes, cuda_emulator::running_work());
    }
    std::memcpy(to, from, bytes);
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*data == nullptr) {
    return refuse_call(cudaErrorMemoryAllocation, __func__, std::to_string(bytes) + " bytes");
  }
  std::memset(*data, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) { return cudaHostAlloc(data, bytes, 0); }

cudaError_t cudaFreeHost(void* data) {
  cuda_emulator::synchronize();
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) { return cudaFreeHost(data); }

}  // extern "C"
