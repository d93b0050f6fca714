// A kernel without launch bounds, with more registers than a block of its largest size could have:
// nvcc says how many, the emulator launches it.
#include "kernels/cuda/runtime.cuh"

using namespace batchops::cuda;

namespace {

constexpr int kHeld = 96;

// A thread holds kHeld values across the barrier.
__global__ void holds_many(const float* in, float* out) {
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = in[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (threadIdx.x == 0) out[i] = held[kHeld - 1 - i];
  }
}

}  // namespace

const char* hold_many(const float* in, float* out, int threads) {
  return launch("holds_many", holds_many, 1, threads, 0, nullptr, in, out);  // fault: launch
}

#ifdef BATCHOPS_CUDA_EMULATOR
#include "control.h"

EMULATOR_EXPORT int emulated_hold_many(const float* in, float* out, int threads, char* text,
                                       size_t size) {
  return cuda_emulator::guarded(text, size, [&] { return hold_many(in, out, threads); });
}
#endif
