#include "launch.h"

#include <algorithm>
#include <string>

#include "host_call.h"
#include "kernel.h"
#include "streams.h"

namespace cuda_emulator {
namespace {

constexpr const char* kCall = "cudaLaunchKernelEx";

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

void check_sizes(const Grid& grid, const Kernel& kernel) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (threads == 0 || threads > 1024 || grid.threads.z > 64) {
    refuse(grid.function, "bad block size " + text(grid.threads) +
                              ", expected 1 to 1024 threads, at most 64 in z");
  }
  if (grid.block_count() == 0 || grid.blocks.x > 0x7fffffffu || grid.blocks.y > 65535 ||
      grid.blocks.z > 65535) {
    refuse(grid.function, "bad grid size " + text(grid.blocks));
  }
  if (kernel.max_threads > 0 && threads > static_cast<uint64_t>(kernel.max_threads)) {
    refuse(grid.function, "block of " + std::to_string(threads) +
                              " threads, its __launch_bounds__ allow " +
                              std::to_string(kernel.max_threads));
  }
  const int count = static_cast<int>(threads);
  if (settings().registers_required && !registers_are_known(kernel)) {
    refuse(grid.function, "nothing is known of its registers");
  }
  if (kernel.registers == 0 &&
      registers_of_block(kMaxRegistersPerThread, count) > kRegistersPerMultiprocessor) {
    refuse(grid.function, "block of " + std::to_string(count) +
                              " threads without __launch_bounds__: the compiler may give each " +
                              std::to_string(kMaxRegistersPerThread) +
                              " registers, a multiprocessor has " +
                              std::to_string(kRegistersPerMultiprocessor));
  }
  if (registers_of_block(kernel.registers, count) > kRegistersPerMultiprocessor) {
    refuse(grid.function, "block of " + std::to_string(count) + " threads with " +
                              std::to_string(kernel.registers) +
                              " registers each, a multiprocessor has " +
                              std::to_string(kRegistersPerMultiprocessor));
  }
}

void check_shared(const Grid& grid, const Kernel& kernel) {
  if (grid.dynamic_shared > settings().shared_limit) {
    refuse(grid.function, "too much shared memory: " + std::to_string(grid.dynamic_shared) +
                              " bytes dynamic, the limit is " +
                              std::to_string(settings().shared_limit));
  }
  if (kernel.static_shared + grid.dynamic_shared > kernel.most_shared()) {
    refuse(grid.function, "too much shared memory: " + std::to_string(grid.dynamic_shared) +
                              " bytes dynamic, cudaFuncSetAttribute has allowed " +
                              std::to_string(kernel.most_shared() - kernel.static_shared));
  }
}

// What a program may try.
cudaError_t check_fit(const Grid& grid, const Kernel& kernel) {
  const unsigned size = grid.cluster_blocks(), most = most_blocks_of_cluster(kernel);
  if (size < 1 || size > most) {
    return refuse_call(cudaErrorInvalidClusterSize, kCall,
                       grid.kernel + ": clusters of " + std::to_string(size) +
                           " blocks, expected 1 to " + std::to_string(most));
  }
  if (grid.blocks.x % grid.cluster.x != 0 || grid.blocks.y % grid.cluster.y != 0 ||
      grid.blocks.z % grid.cluster.z != 0) {
    return refuse_call(
        cudaErrorInvalidClusterSize, kCall,
        grid.kernel + ": clusters " + text(grid.cluster) + " do not divide " + text(grid.blocks));
  }
  if (const int held = settings().blocks_held; held > 0 && size > static_cast<unsigned>(held)) {
    return refuse_call(cudaErrorInvalidClusterSize, kCall,
                       grid.kernel + ": clusters of " + std::to_string(size) +
                           " blocks, of which the process has " + std::to_string(held));
  }
  if (!grid.cooperative) return cudaSuccess;
  const int threads = static_cast<int>(grid.block_threads());
  const int each = blocks_per_multiprocessor(kernel, threads, grid.dynamic_shared);
  auto resident = static_cast<uint64_t>(each) * settings().multiprocessors;
  if (const int held = settings().blocks_held; held > 0) {
    resident = std::min(resident, static_cast<uint64_t>(held));
  }
  if (grid.block_count() <= resident) return cudaSuccess;
  return refuse_call(cudaErrorCooperativeLaunchTooLarge, kCall,
                     grid.kernel + ": " + std::to_string(grid.block_count()) +
                         " blocks, of which the device holds " + std::to_string(resident));
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function,
                   std::function<void()> body) {
  const Kernel& kernel = kernel_of(function);
  Grid grid;
  grid.kernel = kernel.name;
  grid.function = function;
  grid.blocks = config.gridDim;
  grid.threads = config.blockDim;
  grid.dynamic_shared = config.dynamicSmemBytes;
  grid.body = std::move(body);
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributePriority:
        break;
      case cudaLaunchAttributeClusterDimension:
        grid.cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y,
                            attribute.val.clusterDim.z);
        break;
      case cudaLaunchAttributeCooperative:
        grid.cooperative = attribute.val.cooperative != 0;
        break;
      default:
        refuse(grid.function, "launch attribute " + std::to_string(static_cast<int>(attribute.id)) +
                                  " is unknown to the emulator");
    }
  }
  check_sizes(grid, kernel);
  check_shared(grid, kernel);
  const cudaError_t error = check_fit(grid, kernel);
  if (error != cudaSuccess) return error;
  return submit(kCall + (": " + kernel.name), config.stream,
                [grid = std::move(grid)] { run(grid); });
}

}  // namespace cuda_emulator
