// NVIDIA's own occupancy calculation (cuda_occupancy.h), for tests/test_occupancy.py.
#include <algorithm>
#include <climits>
#include <cstddef>

#include "cuda_occupancy.h"

namespace {

cudaOccDeviceProp device(int major, int minor, int threads, int shared) {
  cudaOccDeviceProp d;
  d.computeMajor = major;
  d.computeMinor = minor;
  d.maxThreadsPerBlock = 1024;
  d.maxThreadsPerMultiprocessor = threads;
  d.regsPerBlock = 64 * 1024;
  d.regsPerMultiprocessor = 64 * 1024;
  d.warpSize = 32;
  d.reservedSharedMemPerBlock = major >= 8 ? 1024 : 0;
  d.sharedMemPerBlock = 48 * 1024;
  d.sharedMemPerMultiprocessor = shared;
  d.sharedMemPerBlockOptin = shared - d.reservedSharedMemPerBlock;
  d.numSms = 1;
  return d;
}

}  // namespace

// The largest part of the L1 cache that can serve as shared memory, in bytes.
extern "C" int most_shared(int major, int minor) {
  const cudaOccDeviceProp d = device(major, minor, 2048, 0);
  int most = 0;
  for (int kb = 0; kb <= 256; ++kb) {
    std::size_t size = static_cast<std::size_t>(kb) * 1024;
    if (cudaOccAlignUpShmemSizeVoltaPlus(&size, &d) == CUDA_OCC_SUCCESS) {
      most = std::max(most, static_cast<int>(size));
    }
  }
  return most;
}

// Blocks on a multiprocessor, with the whole of its shared memory to give out; negative on error.
extern "C" int resident_blocks(int major, int minor, int threads_most, int shared_most, int threads,
                               int registers, int shared, int barriers) {
  const cudaOccDeviceProp d = device(major, minor, threads_most, shared_most);
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = INT_MAX;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared;
  kernel.numBlockBarriers = barriers;
  kernel.virtualResourceCount = 0;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
      &result, &d, &kernel, &state, threads, static_cast<std::size_t>(shared));
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor
                                   : -static_cast<int>(error);
}
