#include "host_call.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

namespace cuda_emulator {
namespace {

constexpr int kDepth = 32;
constexpr const char* kLaunchHelper = "/kernels/cuda/runtime.cuh:";

using Stack = std::vector<void*>;

struct Refusal {
  cudaError_t error = cudaSuccess;
  std::string call, why;
  Stack stack;
};
Refusal last;

Stack stack_here() {
  Stack stack(kDepth);
  stack.resize(static_cast<size_t>(backtrace(stack.data(), kDepth)));
  return stack;
}

bool ends_with(const std::string& text, const char* end) {
  const size_t length = std::strlen(end);
  return text.size() >= length && text.compare(text.size() - length, length, end) == 0;
}

// Of the emulator itself, or of the compiler's library. The entry points of tests, lamb_api.cpp and
// the like, are host code as any other.
bool is_ours(const std::string& file) {
  static const std::string here(__FILE__, std::strlen(__FILE__) - std::strlen("host_call.cpp"));
  if (file.rfind("/usr/", 0) == 0 || file.find("/include/c++/") != std::string::npos) return true;
  if (file.rfind(here, 0) != 0) return false;
  const bool entry_point = ends_with(file, "_api.cpp") && file != here + "runtime_api.cpp";
  return ends_with(file, ".h") || (ends_with(file, ".cpp") && !entry_point);
}

// "file:line" of the frames in this library, with what was inlined, innermost first.
std::vector<std::string> lines_of(const Stack& stack) {
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&is_ours), &self) == 0) return {};
  std::string command = "addr2line -i -e '" + std::string(self.dli_fname) + "'";
  for (const void* frame : stack) {
    Dl_info info{};
    if (dladdr(frame, &info) == 0 || info.dli_fbase != self.dli_fbase) continue;
    char offset[32];
    // A return address lies behind its call.
    std::snprintf(offset, sizeof offset, " 0x%zx",
                  static_cast<size_t>(static_cast<const char*>(frame) -
                                      static_cast<const char*>(info.dli_fbase)) -
                      1);
    command += offset;
  }
  std::vector<std::string> lines;
  std::FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return lines;
  char line[1024];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    line[std::strcspn(line, " \n")] = '\0';
    const std::string text(line);
    if (text[0] != '?' && !is_ours(text.substr(0, text.rfind(':')))) lines.push_back(text);
  }
  pclose(pipe);
  return lines;
}

std::string place_in(const Stack& stack) {
  const std::vector<std::string> lines = lines_of(stack);
  if (lines.empty()) return "an unknown place";
  if (lines[0].find(kLaunchHelper) == std::string::npos) return lines[0];
  for (const std::string& line : lines) {
    if (line.find(kLaunchHelper) == std::string::npos) return lines[0] + ", called from " + line;
  }
  return lines[0];
}

}  // namespace

std::string host_line() { return place_in(stack_here()); }

cudaError_t refuse_call(cudaError_t error, std::string call, std::string why) {
  last = {error, std::move(call), std::move(why), stack_here()};
  return error;
}

std::string refusal_behind(const char* message) {
  if (last.error == cudaSuccess) return "";
  if (std::strstr(message, cudaGetErrorName(last.error)) == nullptr) return "";
  return last.call + ": " + last.why + ", at " + place_in(last.stack);
}

void forget_refusals() { last = {}; }

}  // namespace cuda_emulator
