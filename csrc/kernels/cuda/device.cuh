// What host code asks of a device before it plans a launch.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

struct Device {
  int multiprocessors = 1;
  int shared = 48 * 1024;         // bytes that a block may ask for
  int shared_of_all = 48 * 1024;  // … and that the blocks of a multiprocessor have together
  bool clusters = false;
};

inline const char* query(const char* operation, int device, Device& found) {
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
  found.clusters = major >= 9;
  return nullptr;
}

}  // namespace batchops::cuda
