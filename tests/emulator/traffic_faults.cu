// y = 2x over `count` floats, sound and with one fault each in how it goes through memory. The
// tests look the line of a "fault:" comment up and want it in the report.
#include <algorithm>
#include <cstring>

#include "control.h"
#include "kernels/cuda/vector.cuh"

using namespace batchops::cuda;

namespace {

constexpr int kBlock = 64;

BATCHOPS_DEVICE int first() { return static_cast<int>(blockIdx.x * kBlock + threadIdx.x); }

__global__ void sound(const float* x, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) y[i] = 2.0f * x[i];
}

// The same by units of 16 bytes: one access each, whatever the compiler makes of the struct.
__global__ void wide(const float* x, float* y, int count) {
  for (int i = 4 * first(); i < count; i += 4 * kBlock * gridDim.x) {
    float v[4];
    to_float<float, 4>(load_unit<float, 4>(x + i), v);
    for (float& element : v) element *= 2.0f;
    store_unit<float, 4>(y + i, v);
  }
}

__global__ void through_memcpy(const float* x, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) {
    float value;
    memcpy(&value, x + i, sizeof value);
    value *= 2.0f;
    memcpy(y + i, &value, sizeof value);
  }
}

// One thread for all: the same numbers of bytes, by the compiler's own name and the library's.
__global__ void through_builtin_memcpy(const float* x, float* y, int count) {
  if (first() == 0) __builtin_memcpy(y, x, static_cast<size_t>(count) * sizeof(float));
}
__global__ void through_std_copy(const float* x, float* y, int count) {
  if (first() == 0) std::copy_n(x, count, y);
}

__global__ void extra_pass(const float* x, float* y, int count) {
  float sum = 0.0f;
  for (int i = first(); i < count; i += kBlock * gridDim.x) sum += x[i];
  for (int i = first(); i < count; i += kBlock * gridDim.x) y[i] = 2.0f * x[i] + 0.0f * sum;
}

// Every thread a run of its own: neighbours are 16 elements apart.
__global__ void uncoalesced(const float* x, float* y, int count) {
  const int run = count / static_cast<int>(kBlock * gridDim.x);
  for (int i = first() * run; i < (first() + 1) * run; ++i) y[i] = 2.0f * x[i];
}

__global__ void unwritten_tail(const float* x, float* y, int count) {
  for (int i = first(); i < count - 1; i += kBlock * gridDim.x) y[i] = 2.0f * x[i];
}

// The poison's own bits: a value is no proof that an element was written.
__global__ void writes_the_poison(const float*, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) {
    reinterpret_cast<unsigned*>(y)[i] = ~0u;
  }
}

__global__ void written_twice(const float* x, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) y[i] = 2.0f * x[i];
  if (first() == 0) y[count / 2] = 2.0f * x[count / 2];
}

__global__ void read_one_past(const float* x, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) {
    y[i] = x[i] + x[i + 1];  // fault: read past
  }
}

__global__ void read_one_before(const float* x, float* y, int count) {
  for (int i = first(); i < count; i += kBlock * gridDim.x) {
    y[i] = x[i] + x[i - 1];  // fault: read before
  }
}

__global__ void write_one_past(const float* x, float* y, int count) {
  for (int i = first(); i <= count; i += kBlock * gridDim.x) {
    y[i] = 2.0f * x[i < count ? i : 0];  // fault: write past
  }
}

struct Entry {
  const char* name;
  void (*kernel)(const float*, float*, int);
};

constexpr Entry kEntries[] = {
    {"sound", sound},
    {"wide", wide},
    {"through_memcpy", through_memcpy},
    {"through_builtin_memcpy", through_builtin_memcpy},
    {"through_std_copy", through_std_copy},
    {"extra_pass", extra_pass},
    {"uncoalesced", uncoalesced},
    {"unwritten_tail", unwritten_tail},
    {"writes_the_poison", writes_the_poison},
    {"written_twice", written_twice},
    {"read_one_past", read_one_past},
    {"read_one_before", read_one_before},
    {"write_one_past", write_one_past},
};

}  // namespace

EMULATOR_EXPORT int emulated_traffic_fault(const char* name, const float* x, float* y, int count,
                                           int blocks, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) == 0) {
        return launch(name, entry.kernel, blocks, kBlock, 0, nullptr, x, y, count);
      }
    }
    return "no such kernel";
  });
}

EMULATOR_EXPORT int emulated_memset(void* data, size_t bytes, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&] {
    return check("memset", "cudaMemsetAsync", cudaMemsetAsync(data, 0, bytes, nullptr));
  });
}
