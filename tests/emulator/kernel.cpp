#include "kernel.h"

#include <algorithm>
#include <map>

#include "host_call.h"
#include "settings.h"
#include "trap.h"

// Section of the addresses that patchable_function_entry left, see launch_bounds.h.
extern "C" {
extern const unsigned char* const __start___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));
extern const unsigned char* const __stop___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));
}

namespace cuda_emulator {
namespace {

constexpr unsigned char kNop = 0x90;

std::map<std::string, int>& registers_by_name() {
  static std::map<std::string, int> instance;
  return instance;
}

// The compiler put as many no-operations before the function as its launch bounds allow threads.
int launch_bound(const void* function) {
  const auto* code = static_cast<const unsigned char*>(function);
  for (const auto* entry = __start___patchable_function_entries;
       entry != __stop___patchable_function_entries; ++entry) {
    if (*entry >= code || code - *entry > 1024) continue;
    if (std::all_of(*entry, code, [](unsigned char byte) { return byte == kNop; })) {
      return static_cast<int>(code - *entry);
    }
  }
  return 0;
}

int registers_of_warp(int registers_of_thread) {
  return (registers_of_thread * 32 + 255) / 256 * 256;
}

int registers_of(const Kernel& kernel) {
  const auto found = registers_by_name().find(kernel.name);
  if (found != registers_by_name().end()) return found->second;
  if (kernel.max_threads == 0) return 0;
  // Of as many warps in each quarter: see registers_of_block.
  const int threads = (kernel.max_threads + 32 * kQuarters - 1) / (32 * kQuarters) * 32 * kQuarters;
  return std::min(kMaxRegistersPerThread, kRegistersPerMultiprocessor / threads / 8 * 8);
}

}  // namespace

Kernel& kernel_of(const void* function) {
  static std::map<const void*, Kernel> kernels;
  const auto [place, fresh] = kernels.try_emplace(function);
  Kernel& kernel = place->second;
  if (fresh) kernel.max_threads = launch_bound(function);
  kernel.registers = registers_of(kernel);
  return kernel;
}

void name_kernel(const void* function, const char* name) {
  if (kernel_of(function).name != name) kernel_of(function).name = name;
}

void set_registers(const std::string& name, int registers) {
  if (registers == 0) {
    registers_by_name().erase(name);
  } else {
    registers_by_name()[name] = registers;
  }
}

void refuse(const void* function, const std::string& what) {
  throw Error(kernel_of(function).name + ": " + what +
              ", before thread (0, 0, 0) of block (0, 0, 0), at " + source_of(function) +
              ", called at " + host_line() + " " + schedule_text());
}

bool registers_are_known(const Kernel& kernel) { return registers_by_name().contains(kernel.name); }

int registers_of_block(int registers_of_thread, int threads) {
  const int warps = (threads + 31) / 32;
  return (warps + kQuarters - 1) / kQuarters * kQuarters * registers_of_warp(registers_of_thread);
}

unsigned most_blocks_of_cluster(const Kernel& kernel) {
  return kernel.wide_clusters ? kMaxCluster : kPortableCluster;
}

int blocks_per_multiprocessor(const Kernel& kernel, int threads, size_t dynamic_shared) {
  if (settings().blocks_per_multiprocessor > 0) return settings().blocks_per_multiprocessor;
  const int rounded = (threads + 31) / 32 * 32;
  int blocks = std::min(kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / rounded);
  if (kernel.registers > 0) {
    if (registers_of_block(kernel.registers, threads) > kRegistersPerMultiprocessor) return 0;
    const int quarter = kRegistersPerMultiprocessor / kQuarters;
    const int warps = quarter / registers_of_warp(kernel.registers) * kQuarters;
    blocks = std::min(blocks, warps / (rounded / 32));
  }
  const size_t shared = kernel.static_shared + dynamic_shared + kSharedReservedPerBlock;
  const size_t all_shared = settings().shared_limit + kSharedReservedPerBlock;
  return static_cast<int>(std::min<size_t>(static_cast<size_t>(blocks), all_shared / shared));
}

}  // namespace cuda_emulator
