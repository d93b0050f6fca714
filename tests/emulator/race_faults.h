// What the files of kernels with data races share.
#pragma once
#include <cstring>

#include "control.h"
#include "kernels/cuda/runtime.cuh"

namespace race_faults {

using namespace batchops::cuda;

constexpr int kBlock = 64;

// A row of floats in, one out, one of partial results, and flags, which start at 0; each with an
// element for every thread.
struct Data {
  const float* in;
  float* out;
  float* partial;
  unsigned* flags;
};

BATCHOPS_DEVICE int position() { return static_cast<int>(blockIdx.x * kBlock + threadIdx.x); }

struct Entry {
  const char* name;
  void (*kernel)(Data);
  size_t shared = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <size_t kCount>
int run(const Entry (&entries)[kCount], const char* name, const Data& data, int blocks, char* text,
        size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Entry& entry : entries) {
      if (std::strcmp(entry.name, name) != 0) continue;
      const LaunchShape shape{dim3(static_cast<unsigned>(blocks), 1, 1), dim3(kBlock, 1, 1),
                              entry.shared, entry.cluster, entry.cooperative};
      return launch(name, entry.kernel, shape, nullptr, data);
    }
    return "no such kernel";
  });
}

}  // namespace race_faults
