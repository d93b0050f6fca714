// Sums over a warp and over a block, added in an order that depends on the block size only: the
// same bits on every run.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

// The sum of `value` over the warp, in every lane. All 32 lanes must call it.
template <class T>
BATCHOPS_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// a in the lanes without this bit and b in those with it, each added over pairs of lanes.
template <class T>
BATCHOPS_DEVICE T halved(T a, T b, int bit) {
  const bool high = (threadIdx.x & static_cast<unsigned>(bit)) != 0;
  const T sent = high ? a : b;
  return (high ? b : a) + __shfl_xor_sync(kAllLanes, sent, bit);
}
// Four sums over the warp at once, in as many steps as two take: that of index sum_of_lane(), with
// the bits that warp_sum() gives. All 32 lanes must call it.
template <class T>
BATCHOPS_DEVICE T warp_sums(const T (&values)[4]) {
  T sum = halved(halved(values[0], values[1], 16), halved(values[2], values[3], 16), 8);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}
// Below 0 in lanes that need not speak.
BATCHOPS_DEVICE int sum_of_lane(int lane) {
  return (lane & 7) != 0 ? -1 : (lane >> 4) + (lane >> 3 & 1) * 2;
}

// Neighbouring lanes that do something together: a power of two of them, so that who is where takes
// no division.
struct Lanes {
  int shift = 0;

  __host__ __device__ int count() const { return 1 << shift; }
  // Of the team that a thread or item belongs to, and of its place there.
  BATCHOPS_DEVICE int team(int item) const { return item >> shift; }
  BATCHOPS_DEVICE int lane(int item) const { return item & (count() - 1); }
};

// The sum of `value` over `lanes` neighbours, in each of them. All lanes of the warp must call it.
BATCHOPS_DEVICE double sum_of_lanes(double value, int lanes) {
  for (int distance = lanes >> 1; distance > 0; distance >>= 1) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}
BATCHOPS_DEVICE float2 sum_of_lanes(float2 value, int lanes) {
  for (int distance = lanes >> 1; distance > 0; distance >>= 1) {
    value.x += __shfl_xor_sync(kAllLanes, value.x, distance);
    value.y += __shfl_xor_sync(kAllLanes, value.y, distance);
  }
  return value;
}

// Each values[i] summed over a block of kThreads threads, in every thread. All threads must call
// it; it may be called again at once (it ends with a barrier).
template <int kThreads, int kValues, class T>
BATCHOPS_DEVICE void block_sum(T (&values)[kValues]) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / kWarp;
  BATCHOPS_SHARED(by_warp, T[kValues][kWarps]);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) by_warp[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = by_warp[i][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) values[i] += by_warp[i][w];
  }
  __syncthreads();
}

}  // namespace batchops::cuda
