// Kernels with one fault each, for tests/test_machine_code.py: what is planted must be found by the
// check that is meant for it and by no other. `clean` has none.
#include <cstdint>

#define BLOCK(blocks) __global__ void __launch_bounds__(256, blocks)

// y = 2 x, 16 bytes at a time.
BLOCK(1) clean(const float4* x, float4* y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  const float4 v = x[i];
  y[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

// kValues floats that are all alive at once: every one is loaded before the first is used, and
// each result needs them all.
template <int kValues>
__device__ __forceinline__ void all_at_once(const float4* x, float4* y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  float4 v[kValues / 4];
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k) v[k] = __ldcv(x + i + k * 4096);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k) sum += v[k].x + v[k].y * v[k].z + v[k].w;
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k) {
    __stwt(y + i + k * 4096, make_float4(v[k].x * sum, v[k].y * sum, v[k].z * sum, v[k].w * sum));
  }
}

// Asks for 4 blocks, 64 registers, with 96 values alive.
BLOCK(4) spills(const float4* x, float4* y) { all_at_once<96>(x, y); }

// Takes the registers instead, so that fewer blocks fit than were meant.
BLOCK(1) too_many_registers(const float4* x, float4* y) { all_at_once<96>(x, y); }

// An array indexed at run time lives in local memory.
BLOCK(1) array_in_local_memory(const float4* x, float4* y, int n) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  float4 v[16];
  for (int k = 0; k < 16; ++k) v[k] = x[i + k];
  for (int k = 0; k < n; ++k) v[k % 16].x += v[(k * 7 + n) % 16].y;
  y[i] = v[n % 16];
}

// 4 bytes at a time.
BLOCK(1) narrow(const float* x, float* y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  y[i] = 2 * x[i];
}

// Loads 16 bytes and stores them in four pieces.
BLOCK(1) split_store(const float4* x, float* y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  const float4 v = x[i];
  volatile float* to = y + 4 * i;
  to[0] = 2 * v.x;
  to[1] = 2 * v.y;
  to[2] = 2 * v.z;
  to[3] = 2 * v.w;
}

// Few registers, and shared memory for one block on most targets.
BLOCK(1) too_much_shared_memory(const float4* x, float4* y) {
  __shared__ float4 tile[48 * 1024 / sizeof(float4)];
#pragma unroll 1
  for (int k = threadIdx.x; k < 3072; k += 256) tile[k] = x[k];
  __syncthreads();
  y[blockIdx.x * 256 + threadIdx.x] = tile[(threadIdx.x * 37) % 3072];
}
