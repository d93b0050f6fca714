// One element before and past each kind of memory, read and written: what AddressSanitizer and
// UndefinedBehaviorSanitizer are for. The tests look the lines of "fault:" comments up.
#include <cstring>

#include "control.h"
#include "kernels/cuda/vector.cuh"

using namespace batchops::cuda;

namespace {

constexpr int kBlock = 64;

enum class Where { global, fixed, dynamic };

// Element threadIdx.x + kShift of 64, read or written.
template <Where kWhere, bool kWrites, int kShift>
__global__ void shifted(const float* in, float* out) {
  BATCHOPS_SHARED(before, float[kBlock]);
  BATCHOPS_SHARED(between, float[kBlock]);
  BATCHOPS_SHARED(after, float[kBlock]);
  BATCHOPS_DYNAMIC_SHARED(dynamic, float);
  const int t = static_cast<int>(threadIdx.x);
  before[t] = between[t] = after[t] = dynamic[t] = in[t];
  __syncthreads();
  const float* from = kWhere == Where::global ? in : kWhere == Where::fixed ? between : dynamic;
  float* to = kWhere == Where::global ? out : kWhere == Where::fixed ? between : dynamic;
  if (kWrites) {
    to[t + kShift] = in[t];  // fault: written
  } else {
    out[t] = from[t + kShift];  // fault: read
  }
}

// An address that a 16-byte access of shared memory may not have.
__global__ void misaligned_shared(const float* in, float* out) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float v[4] = {};
  if (threadIdx.x == 0) to_float<float, 4>(load_unit<float, 4>(&tile[1]), v);  // fault: misaligned
  out[threadIdx.x] = v[0];
}

struct Entry {
  const char* name;
  void (*kernel)(const float*, float*);
};

constexpr Entry kEntries[] = {
    {"global_read_before", shifted<Where::global, false, -1>},
    {"global_read_past", shifted<Where::global, false, 1>},
    {"global_written_before", shifted<Where::global, true, -1>},
    {"global_written_past", shifted<Where::global, true, 1>},
    {"static_read_before", shifted<Where::fixed, false, -1>},
    {"static_read_past", shifted<Where::fixed, false, 1>},
    {"static_written_before", shifted<Where::fixed, true, -1>},
    {"static_written_past", shifted<Where::fixed, true, 1>},
    {"dynamic_read_before", shifted<Where::dynamic, false, -1>},
    {"dynamic_read_past", shifted<Where::dynamic, false, 1>},
    {"dynamic_written_before", shifted<Where::dynamic, true, -1>},
    {"dynamic_written_past", shifted<Where::dynamic, true, 1>},
    {"within", shifted<Where::dynamic, true, 0>},
    {"misaligned_shared", misaligned_shared},
};

}  // namespace

EMULATOR_EXPORT int emulated_fault(const char* name, const float* in, float* out, char* text,
                                   size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) == 0) {
        return launch(name, entry.kernel, 1, kBlock, kBlock * sizeof(float), nullptr, in, out);
      }
    }
    return "no such kernel";
  });
}
