// Kernels with one fault each, and the same kernels without it: proof that the emulator's checks
// find what they are for. The tests look the line of a "fault:" comment up and want it in the
// error.
#include <cstring>

#include "control.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

using namespace batchops::cuda;

namespace {

constexpr int kBlock = 64;

// out[i] = in[63 - i], through shared memory.
template <bool kFaulty>
__global__ void reverse(const float* in, float* out) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kFaulty) __syncthreads();
  out[threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

// Two sums over the block through the same shared words. Without the barrier between them a fast
// warp's second value overwrites a first that a slow warp has not read.
template <bool kFaulty>
__global__ void two_sums(const float* in, float* out) {
  BATCHOPS_SHARED(by_warp, float[2]);
  float total = 0.0f;
  for (int round = 1; round <= 2; ++round) {
    const float sum = warp_sum(in[threadIdx.x] * static_cast<float>(round));
    if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    total += by_warp[0] + by_warp[1];
    if (!kFaulty) __syncthreads();
  }
  out[threadIdx.x] = total;
}

// A sum that changes with the order of arrival, as a float atomic's does.
__global__ void unordered_sum(const float* in, float* out) {
  if (threadIdx.x == 0 && blockIdx.x == 0) *out = 0.0f;
  __syncthreads();
  atomicAdd(out, in[threadIdx.x]);
}

__global__ void barrier_in_a_branch(const float*, float* out) {
  if (threadIdx.x < kBlock / 2) {
    __syncthreads();  // fault: one half
    out[threadIdx.x] = 1.0f;
  } else {
    __syncthreads();  // fault: other half
    out[threadIdx.x] = 2.0f;
  }
}

__global__ void barrier_after_exit(const float*, float* out) {
  if (threadIdx.x >= kBlock / 2) return;
  __syncthreads();  // fault: exited
  out[threadIdx.x] = 1.0f;
}

__global__ void mask_with_an_exited_lane(const float* in, float* out) {
  if (threadIdx.x >= 48) return;
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, in[threadIdx.x], 1);  // fault: mask
}

__global__ void lane_outside_its_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1);  // fault: own mask
}

__global__ void different_masks(const float* in, float* out) {
  const unsigned mask = threadIdx.x % kWarp < 8 ? kAllLanes : 0xffffff00u;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);  // fault: masks differ
}

__global__ void barrier_against_shuffle(const float* in, float* out) {
  if (threadIdx.x % kWarp == 0) {
    __syncthreads();  // fault: deadlock
    out[threadIdx.x] = 0.0f;
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, in[threadIdx.x], 1);
  }
}

__global__ void static_shared_too_large(const float*, float* out) {
  BATCHOPS_SHARED(large, float[13 * 1024]);
  large[threadIdx.x] = 1.0f;
  out[threadIdx.x] = large[threadIdx.x];
}

__global__ void dynamic_shared(const float* in, float* out) {
  BATCHOPS_DYNAMIC_SHARED(tile, float);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void read_past_the_end(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];  // fault: read past
}

__global__ void write_past_the_end(const float* in, float* out) {
  out[threadIdx.x + 1] = in[threadIdx.x];  // fault: write past
}

__global__ void misaligned_vector(const float* in, float* out) {
  if (threadIdx.x > 0) return;
  float v[4];
  to_float<float, 4>(load_unit<float, 4>(in + 1), v);  // fault: misaligned
  out[0] = v[0];
}

__global__ void shared_past_the_end(const float* in, float* out) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];  // fault: shared past
}

__global__ void unwritten_shared(const float*, float* out) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  out[threadIdx.x] = tile[threadIdx.x];
}

struct Entry {
  const char* name;
  void (*kernel)(const float*, float*);
  int threads = kBlock;
  size_t shared = 0;
};

constexpr Entry kEntries[] = {
    {"reverse", reverse<false>},
    {"reverse_without_barrier", reverse<true>},
    {"two_sums", two_sums<false>},
    {"two_sums_without_barrier", two_sums<true>},
    {"unordered_sum", unordered_sum},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"barrier_after_exit", barrier_after_exit},
    {"mask_with_an_exited_lane", mask_with_an_exited_lane},
    {"lane_outside_its_mask", lane_outside_its_mask},
    {"different_masks", different_masks},
    {"barrier_against_shuffle", barrier_against_shuffle},
    {"static_shared_too_large", static_shared_too_large},
    {"dynamic_shared_fits", dynamic_shared, kBlock, 227 * 1024},
    {"dynamic_shared_too_large", dynamic_shared, kBlock, 227 * 1024 + 16},
    {"block_too_large", reverse<false>, 1025},
    {"read_past_the_end", read_past_the_end},
    {"write_past_the_end", write_past_the_end},
    {"misaligned_vector", misaligned_vector},
    {"shared_past_the_end", shared_past_the_end},
    {"unwritten_shared", unwritten_shared},
};

const char* run(const Entry& e, const float* in, float* out) {
  return launch(e.name, e.kernel, 1, e.threads, e.shared, nullptr, in, out);  // fault: launch
}

}  // namespace

EMULATOR_EXPORT int emulated_fault(const char* name, const float* in, float* out, char* text,
                                   size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) == 0) return run(entry, in, out);
    }
    return "no such kernel";
  });
}
