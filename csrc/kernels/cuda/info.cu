#include "kernels/info.h"

#include <fstream>
#include <string>

#include "kernels/cuda/device.cuh"

#ifndef BATCHOPS_CUDA_TARGETS
#error "the build passes the machine-code targets: -DBATCHOPS_CUDA_TARGETS=\"sm_90,sm_120\""
#endif

namespace batchops {
inline namespace info_cu {

// The oldest driver that runs programs of the toolkit this is built with (CUDA compatibility table:
// minor versions of one major share it).
constexpr int kDriverNeeded = CUDART_VERSION >= 13000 ? 580 : CUDART_VERSION >= 12000 ? 525 : 450;

// "570.86.15", or "" where the kernel module is not loaded.
std::string driver_release() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word;
  while (file >> word) {
    if (word.find_first_not_of("0123456789.") == std::string::npos &&
        word.find('.') != std::string::npos) {
      return word;
    }
  }
  return "";
}

}  // namespace info_cu

bool built_with_cuda() { return true; }

const char* cuda_targets() { return BATCHOPS_CUDA_TARGETS; }

int cuda_toolkit_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return version;
}

int cuda_device_count(const char** message) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) {
    if (message != nullptr) *message = nullptr;
    return count;
  }
  static_cast<void>(cudaGetLastError());
  if (message == nullptr) return 0;

  const int driver = cuda_driver_version();
  const std::string release = driver_release();
  const char* what = release.empty() ? "unknown release" : release.c_str();
  constexpr int kMajor = CUDART_VERSION / 1000;
  constexpr int kMinor = CUDART_VERSION % 1000 / 10;
  if (driver == 0) {
    *message = cuda::message(
        "no NVIDIA driver was found; batchops' CUDA %d.%d runtime needs driver %d or newer", kMajor,
        kMinor, kDriverNeeded);
  } else if (error == cudaErrorInsufficientDriver || driver / 1000 < kMajor) {
    *message = cuda::message(
        "batchops' CUDA %d.%d runtime needs NVIDIA driver %d or newer; found driver %s, which "
        "supports up to CUDA %d.%d",
        kMajor, kMinor, kDriverNeeded, what, driver / 1000, driver % 1000 / 10);
  } else if (error == cudaSuccess || error == cudaErrorNoDevice) {
    *message = cuda::message(
        "no CUDA device is visible (driver %s, CUDA_VISIBLE_DEVICES may hide it)", what);
  } else {
    *message = cuda::message("cudaGetDeviceCount failed: %s (driver %s, CUDA %d.%d)",
                             cudaGetErrorString(error), what, driver / 1000, driver % 1000 / 10);
  }
  return 0;
}

const char* cuda_problem(int device) {
  const char* const error = cuda::use_device("batchops", device);
  if (error == nullptr) return nullptr;
  const char* message = nullptr;
  return cuda_device_count(&message) == 0 ? message : error;
}

bool cuda_lock_pages(void* data, size_t bytes, int device) {
  constexpr const char* kOp = "batchops";
  const cuda::BesideCaptures guard;
  return cuda::set_device(kOp, device) == nullptr &&
         cuda::check(kOp, "cudaHostRegister",
                     cudaHostRegister(data, bytes, cudaHostRegisterPortable)) == nullptr;
}

bool cuda_unlock_pages(void* data, int device) {
  constexpr const char* kOp = "batchops";
  const cuda::BesideCaptures guard;
  return cuda::set_device(kOp, device) == nullptr &&
         cuda::check(kOp, "cudaHostUnregister", cudaHostUnregister(data)) == nullptr;
}

bool cuda_stream_captures(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

}  // namespace batchops
