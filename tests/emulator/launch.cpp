#include "launch.h"

#include <string>

#include "kernel.h"
#include "streams.h"
#include "trap.h"

namespace cuda_emulator {
namespace {

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// No thread has run: the line is that of the kernel's definition.
[[noreturn]] void refuse(const Grid& grid, const std::string& what) {
  throw Error(grid.kernel + ": " + what + ", before thread (0, 0, 0) of block (0, 0, 0), at " +
              source_of(grid.function) + " " + schedule_text());
}

void check_sizes(const Grid& grid, const Kernel& kernel) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (threads == 0 || threads > 1024 || grid.threads.z > 64) {
    refuse(grid, "bad block size " + text(grid.threads) +
                     ", expected 1 to 1024 threads, at most 64 in z");
  }
  if (grid.block_count() == 0 || grid.blocks.x > 0x7fffffffu || grid.blocks.y > 65535 ||
      grid.blocks.z > 65535) {
    refuse(grid, "bad grid size " + text(grid.blocks));
  }
  if (kernel.max_threads > 0 && threads > static_cast<uint64_t>(kernel.max_threads)) {
    refuse(grid, "block of " + std::to_string(threads) + " threads, its __launch_bounds__ allow " +
                     std::to_string(kernel.max_threads));
  }
  const uint64_t warps = (threads + 31) / 32;
  const uint64_t warp_registers = (static_cast<uint64_t>(kernel.registers) * 32 + 255) / 256 * 256;
  if (warps * warp_registers > kRegistersPerMultiprocessor) {
    refuse(grid, "block of " + std::to_string(threads) + " threads with " +
                     std::to_string(kernel.registers) + " registers each, a multiprocessor has " +
                     std::to_string(kRegistersPerMultiprocessor));
  }
}

void check_shared(const Grid& grid, const Kernel& kernel) {
  if (grid.dynamic_shared > settings().shared_limit) {
    refuse(grid, "too much shared memory: " + std::to_string(grid.dynamic_shared) +
                     " bytes dynamic, the limit is " + std::to_string(settings().shared_limit));
  }
  if (grid.dynamic_shared > kernel.max_dynamic_shared) {
    refuse(grid, "too much shared memory: " + std::to_string(grid.dynamic_shared) +
                     " bytes dynamic, cudaFuncSetAttribute has allowed " +
                     std::to_string(kernel.max_dynamic_shared));
  }
}

bool cluster_fits(const Grid& grid, const Kernel& kernel) {
  const unsigned size = grid.cluster_blocks();
  return size >= 1 && size <= (kernel.wide_clusters ? kMaxCluster : kPortableCluster) &&
         grid.blocks.x % grid.cluster.x == 0 && grid.blocks.y % grid.cluster.y == 0 &&
         grid.blocks.z % grid.cluster.z == 0;
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
  grid.stream = config.stream;
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
        refuse(grid, "launch attribute " + std::to_string(static_cast<int>(attribute.id)) +
                         " is unknown to the emulator");
    }
  }
  check_sizes(grid, kernel);
  check_shared(grid, kernel);
  if (!cluster_fits(grid, kernel)) return cudaErrorInvalidClusterSize;
  if (grid.cooperative) {
    const int threads = static_cast<int>(grid.block_threads());
    const int each = blocks_per_multiprocessor(kernel, threads, grid.dynamic_shared);
    const auto resident = static_cast<uint64_t>(each) * settings().multiprocessors;
    if (grid.block_count() > resident) return cudaErrorCooperativeLaunchTooLarge;
  }
  return submit(config.stream, [grid = std::move(grid)] { run(grid); });
}

}  // namespace cuda_emulator
