// What the emulator knows of a kernel apart from its code, and what a device holds of it.
#pragma once
#include <cstddef>
#include <string>

#include <vector_types.h>

namespace cuda_emulator {

constexpr int kRegistersPerMultiprocessor = 65536;
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
  // What cudaFuncSetAttribute has asked for.
  size_t max_dynamic_shared = kSharedWithoutAsking;
  bool wide_clusters = false;
};

// By the address of its function, for as long as the process lives.
Kernel& kernel_of(const void* function);
// Names `function`; the name is what errors say and what set_registers goes by.
void name_kernel(const void* function, const char* name);
// Registers a thread of the kernels of this name takes, as the compiler reported them; 0 forgets.
void set_registers(const std::string& name, int registers);

// Blocks of this kernel that one multiprocessor holds at once; 0 when it holds none.
int blocks_per_multiprocessor(const Kernel& kernel, int threads, size_t dynamic_shared);

}  // namespace cuda_emulator
