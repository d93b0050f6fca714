// Stand-ins for the CUDA runtime's host calls that the kernels' launch code makes.
#include <cuda_runtime_api.h>

#include "scheduler.h"

extern "C" {

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
      static_cast<size_t>(value) > cuda_emulator::settings().shared_limit) {
    throw cuda_emulator::Error(
        "cudaFuncSetAttribute: too much shared memory: " + std::to_string(value) +
        " bytes, the limit is " + std::to_string(cuda_emulator::settings().shared_limit));
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulator::settings().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulator::settings().shared_limit);
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  if (auto* o = cuda_emulator::observer()) o->memory_operation(data, nullptr, bytes, stream);
  __builtin_memset(data, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
