// What the emulator knows of a kernel apart from its code, and what a device holds of it.
#pragma once
#include <cstddef>
#include <string>

#include <vector_types.h>

namespace cuda_emulator {

constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kQuarters = 4;
constexpr int kThreadsPerBlock = 1024;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kBlocksPerMultiprocessor = 32;
constexpr int kMaxRegistersPerThread = 255;
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kSharedReservedPerBlock = 1024;
constexpr unsigned kMaxCluster = 16;
constexpr unsigned kPortableCluster = 8;

struct Kernel {
  std::string name = "kernel";
  // Of __launch_bounds__; 0 where there are none.
  int max_threads = 0;
  // A thread's. Set by name (set_registers), else what launch bounds leave: 0 without any.
  int registers = 0;
  size_t static_shared = 0;  // the most that a run has used
  // What cudaFuncSetAttribute has asked for; else static and dynamic together have
  // kSharedWithoutAsking.
  size_t asked_shared = 0;
  bool wide_clusters = false;

  size_t most_shared() const {
    const size_t asked = static_shared + asked_shared;
    return asked > kSharedWithoutAsking ? asked : kSharedWithoutAsking;
  }
};

// By the address of its function, for as long as the process lives.
Kernel& kernel_of(const void* function);
// Throws an Error about a call that can only be a mistake: `what`, no thread having run, the line
// of the kernel's definition, and that of the host's call.
[[noreturn]] void refuse(const void* function, const std::string& what);
// Names `function`; the name is what errors say and what set_registers goes by.
void name_kernel(const void* function, const char* name);
// Registers a thread of the kernels of this name takes, as the compiler reported them; 0 forgets.
void set_registers(const std::string& name, int registers);
bool registers_are_known(const Kernel& kernel);

// Registers that a block must find free: pieces of 256 a warp, and in every quarter of the
// multiprocessor as many warps as in the fullest.
int registers_of_block(int registers_of_thread, int threads);
unsigned most_blocks_of_cluster(const Kernel& kernel);
// Blocks of this kernel that one multiprocessor holds at once; 0 when it holds none.
int blocks_per_multiprocessor(const Kernel& kernel, int threads, size_t dynamic_shared);

}  // namespace cuda_emulator
