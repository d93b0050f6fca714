// What host code asks of a device before it plans a launch.
#pragma once
#include <string>

#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

struct Device {
  int multiprocessors = 1;
  int shared = 48 * 1024;         // bytes that a block may ask for
  int shared_of_all = 48 * 1024;  // … and that the blocks of a multiprocessor have together
  bool clusters = false;
  int most_cluster = 1;  // blocks of a cluster, with a multiprocessor each, that it has room for
};

// Never launched: asked what its code was made from.
template <int>
__global__ void code_probe() {}

// Of the current device, `device`. Fails where it has no code in this build.
inline const char* ask(const char* operation, int device, Device& found) {
  int major = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrMaxSharedMemoryPerBlockOptin, &found.shared},
                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &found.shared_of_all},
                {cudaDevAttrMultiProcessorCount, &found.multiprocessors},
                {cudaDevAttrComputeCapabilityMajor, &major}};
  for (const auto& one : wanted) {
    if (const char* error = check(operation, "cudaDeviceGetAttribute",
                                  cudaDeviceGetAttribute(one.value, one.attribute, device))) {
      return error;
    }
  }
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(code_probe<0>));
  if (error != cudaSuccess) {
    int minor = 0;
    static_cast<void>(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    const char* why = check(operation, "cudaFuncGetAttributes", error);
    return message("%s: this build has no code for CUDA device %d (compute capability %d.%d): %s",
                   operation, device, major, minor, std::string(why).c_str());
  }
  // What the device itself makes of older code has none.
  found.clusters = major >= 9 && attributes.ptxVersion >= 90;
  if (!found.clusters) return nullptr;
  // Blocks that take a multiprocessor each: sixteen of them are more than every part of a device,
  // or every device, has room for.
  for (unsigned size = 16; size > 1; size /= 2) {
    const LaunchShape shape{dim3(size, 1, 1), dim3(512, 1, 1), static_cast<size_t>(found.shared),
                            size};
    int clusters = 0;
    if (resident_clusters(operation, code_probe<0>, shape, &clusters) == nullptr && clusters > 0) {
      found.most_cluster = static_cast<int>(size);
      break;
    }
  }
  return nullptr;
}

// Makes `device` current; the same, asked once for each. Fails where it cannot be used.
inline const char* query(const char* operation, int device, Device& found) {
  if (const char* error = set_device(operation, device)) return error;
  return asked_once(device, found, [&](Device& of) { return ask(operation, device, of); });
}

// What each entry point does first.
inline const char* use_device(const char* operation, int device) {
  Device unused;
  return query(operation, device, unused);
}

}  // namespace batchops::cuda
