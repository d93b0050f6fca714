// Runs what nvcc made of a kernel, its PTX, in place of the emulated C++: inline assembly, the code
// under __CUDA_ARCH__, every access with the width that it has. Threads are the same fibers, and
// barriers, warps, clusters, atomics and copies are the emulator's (scheduler.h).
//
// Approximate instructions give the nearest float, denormals aside; ptxas may fuse a product and a
// sum where PTX leaves it free, and here they are not fused.
#pragma once
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace cuda_emulator::ptx {

struct Code;

// Takes the kernels of a file, by their names; its target is the code's from here on. Throws
// Syntax; a runtime_error if it cannot be read.
void load(const std::string& file);
// From here on kernels run as C++ again.
void forget();
// Of what is loaded, the names of instructions that would fail if they ran.
std::set<std::string> unknown_instructions();
// What to run for the kernel of that address, or null while nothing is loaded. Throws Error where
// something is and this kernel is not there.
const Code* code_of(const void* kernel);
// One thread of it, the running one.
void run(const Code& code, const void* const* params, const size_t* sizes, size_t count);

// Instructions that threads have run of kernels since it was last asked for.
struct Count {
  std::string name;  // its first words: "ld.global"
  std::string file;
  unsigned line;
  uint64_t runs;
};
std::vector<Count> take_counts();

}  // namespace cuda_emulator::ptx
