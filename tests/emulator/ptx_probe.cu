// A kernel whose PTX tests write themselves: this one does nothing.
#include "kernels/cuda/runtime.cuh"

#include "control.h"

extern "C" __global__ __launch_bounds__(64) void ptx_probe(uint64_t*) {}

EMULATOR_EXPORT int emulated_ptx_probe(uint64_t* words, int blocks, int threads, int cluster,
                                       int dynamic_shared, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&] {
    batchops::cuda::LaunchShape shape{dim3(static_cast<unsigned>(blocks), 1, 1),
                                      dim3(static_cast<unsigned>(threads), 1, 1),
                                      static_cast<size_t>(dynamic_shared)};
    shape.cluster = static_cast<unsigned>(cluster);
    return batchops::cuda::launch("ptx_probe", &ptx_probe, shape, nullptr, words);
  });
}
