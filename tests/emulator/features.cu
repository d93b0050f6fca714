// One kernel for each part of CUDA that the emulator knows, used as it is meant to be. The same
// source compiles with nvcc (test_emulator_features.py): the spelling is CUDA's.
#include "kernels/cuda/runtime.cuh"

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <cstring>

#ifdef BATCHOPS_CUDA_EMULATOR
#include "control.h"
#endif

using namespace batchops::cuda;
namespace cg = cooperative_groups;

namespace {

constexpr int kBlock = 64;

struct Buffers {
  const float* in;
  float* out;
  unsigned* words;  // zero before the launch
  unsigned long long* wide;
  double* doubles;
  int n;
};

BATCHOPS_DEVICE float slice_sum(const float* in, unsigned block, int n) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += in[block * static_cast<unsigned>(n) + i];
  return sum;
}

// ---- grids

// Every block's sum to a slot, then all slots' sum in every block.
__global__ void grid_sum(Buffers b) {
  const cg::grid_group grid = cg::this_grid();
  if (threadIdx.x == 0) b.out[gridDim.x + blockIdx.x] = slice_sum(b.in, blockIdx.x, b.n);
  grid.sync();
  if (cg::this_thread_block().thread_rank() != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < grid.num_blocks(); ++i) total += b.out[gridDim.x + i];
  b.out[grid.block_rank()] = total;
}

// The same in two halves, with work of its own between.
__global__ void grid_sum_in_halves(Buffers b) {
  cg::grid_group grid = cg::this_grid();
  if (threadIdx.x == 0) b.out[gridDim.x + blockIdx.x] = slice_sum(b.in, blockIdx.x, b.n);
  auto token = grid.barrier_arrive();
  const float mine = slice_sum(b.in, blockIdx.x, b.n);
  grid.barrier_wait(static_cast<decltype(token)&&>(token));
  if (threadIdx.x != 0) return;
  float total = mine;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    if (i != blockIdx.x) total += b.out[gridDim.x + i];
  }
  b.out[blockIdx.x] = total;
}

enum class Spin { acquire, update, polite_volatile, bare_volatile };

template <Spin kSpin>
BATCHOPS_DEVICE void wait_for(unsigned* counter, unsigned count) {
  if constexpr (kSpin == Spin::acquire) {
    while (__nv_atomic_load_n(counter, __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE) != count) {
    }
  } else if constexpr (kSpin == Spin::update) {
    while (atomicAdd(counter, 0u) != count) {
    }
    __threadfence();
  } else if constexpr (kSpin == Spin::polite_volatile) {
    while (*static_cast<volatile unsigned*>(counter) != count) __nanosleep(32);
    __threadfence();
  } else {
    while (*static_cast<volatile unsigned*>(counter) != count) {
    }
    __threadfence();
  }
}

// The blocks of a channel (blockIdx.y) meet at its counter; the last to leave puts it back.
template <Spin kSpin>
__global__ void channel_sum(Buffers b) {
  const unsigned channel = blockIdx.y;
  float* partial = b.out + gridDim.y + channel * gridDim.x;
  unsigned* counter = b.words + channel * 2;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = slice_sum(b.in, channel * gridDim.x + blockIdx.x, b.n);
    __threadfence();
    atomicAdd(counter, 1u);
    wait_for<kSpin>(counter, gridDim.x);
  }
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) b.out[channel] = total;
    __threadfence();
    if (atomicAdd(counter + 1, 1u) == gridDim.x - 1) {
      counter[0] = 0;
      counter[1] = 0;
    }
  }
}

// Nobody waits: the block that comes last does the rest.
__global__ void last_block_sum(Buffers b) {
  BATCHOPS_SHARED(is_last, bool);
  if (threadIdx.x == 0) {
    b.out[1 + blockIdx.x] = slice_sum(b.in, blockIdx.x, b.n);
    __threadfence();
    is_last = atomicInc(b.words, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  __threadfence();
  float total = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) total += b.out[1 + i];
  b.out[0] = total;
}

__global__ void dimensions(Buffers b) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  b.words[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

// ---- clusters

#if BATCHOPS_HAS_CLUSTERS
// Each block's sum in its own shared memory; each reads the others'.
BATCHOPS_DEVICE void cluster_pull(Buffers b) {
  const cg::cluster_group cluster = cg::this_cluster();
  BATCHOPS_SHARED(mine, float);
  if (threadIdx.x == 0) mine = slice_sum(b.in, blockIdx.x, b.n);
  cluster.sync();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned r = 0; r < cluster.num_blocks(); ++r) {
      total += *cluster.map_shared_rank(&mine, static_cast<int>(r));
    }
    b.out[blockIdx.x] = total;
  }
  cluster.sync();
}

// Each block puts its sum into the dynamic shared memory of all; the barrier in halves.
BATCHOPS_DEVICE void cluster_push(Buffers b) {
  const cg::cluster_group cluster = cg::this_cluster();
  BATCHOPS_DYNAMIC_SHARED(sums, float);
  cluster.sync();  // all have started
  if (threadIdx.x < cluster.num_blocks()) {
    *cluster.map_shared_rank(sums + cluster.block_rank(), static_cast<int>(threadIdx.x)) =
        slice_sum(b.in, blockIdx.x, b.n);
  }
  auto token = cluster.barrier_arrive();
  cluster.barrier_wait(static_cast<decltype(token)&&>(token));
  float total = 0.0f;
  for (unsigned r = 0; r < cluster.num_blocks(); ++r) total += sums[r];
  if (threadIdx.x == 0) b.out[blockIdx.x] = total;
}

// Where the block is, in both spellings, and an atomic on another block's shared memory.
BATCHOPS_DEVICE void cluster_places(Buffers b) {
  const cg::cluster_group cluster = cg::this_cluster();
  BATCHOPS_SHARED(visitors, unsigned);
  if (threadIdx.x == 0) visitors = 0;
  cluster.sync();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  unsigned* there = cluster.map_shared_rank(&visitors, static_cast<int>(next));
  atomicAdd(there, 1u);
  const bool right = cluster.query_shared_rank(there) == next &&
                     __clusterRelativeBlockRank() == cluster.block_rank() &&
                     __clusterSizeInBlocks() == cluster.num_blocks() &&
                     __clusterDim().x == cluster.dim_blocks().x &&
                     __clusterIdx().x == blockIdx.x / cluster.dim_blocks().x &&
                     cluster.block_index().x == blockIdx.x % cluster.dim_blocks().x &&
                     cluster.thread_rank() == cluster.block_rank() * blockDim.x + threadIdx.x;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  b.words[blockIdx.x * blockDim.x + threadIdx.x] = right ? visitors : 0;
}
#else
BATCHOPS_DEVICE void cluster_pull(Buffers) {}
BATCHOPS_DEVICE void cluster_push(Buffers) {}
BATCHOPS_DEVICE void cluster_places(Buffers) {}
#endif
__global__ void cluster_sum_by_pull(Buffers b) { cluster_pull(b); }
__global__ void cluster_sum_by_push(Buffers b) { cluster_push(b); }
__global__ void cluster_identity(Buffers b) { cluster_places(b); }

// ---- blocks and warps

// Warp 1 hands each round's values to warp 0 by two named barriers; the other warps run free.
__global__ void producer_and_consumer(Buffers b) {
  BATCHOPS_SHARED(slot, float[kWarp]);
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  constexpr unsigned kFull = 1, kEmpty = 2;
  if (warp == 0) {
    float sum = 0.0f;
    for (int i = 0; i < b.n; ++i) {
      __barrier_sync_count(kFull, 2 * kWarp);
      sum += slot[lane];
      __barrier_sync_count(kEmpty, 2 * kWarp);
    }
    b.out[lane] = sum;
  } else if (warp == 1) {
    for (int i = 0; i < b.n; ++i) {
      slot[lane] = b.in[i * kWarp + static_cast<int>(lane)];
      __barrier_sync_count(kFull, 2 * kWarp);
      __barrier_sync_count(kEmpty, 2 * kWarp);
    }
  }
  __barrier_sync(0);
}

__global__ void block_votes(Buffers b) {
  const int odd = threadIdx.x % 2;
  const int count = __syncthreads_count(odd);
  const int all = __syncthreads_and(odd) * 2 + __syncthreads_and(1);
  const int any = __syncthreads_or(odd) * 2 + __syncthreads_or(0);
  b.words[threadIdx.x] = static_cast<unsigned>(count * 100 + all * 10 + any);
}

__global__ void warp_operations(Buffers b) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const int value = static_cast<int>(lane) - 8;
  int same = 0;
  unsigned* row = b.words + lane * 12;
  row[0] = static_cast<unsigned>(__reduce_add_sync(kAllLanes, value));
  row[1] = static_cast<unsigned>(__reduce_min_sync(half, value));
  row[2] = static_cast<unsigned>(__reduce_max_sync(half, value));
  row[3] = __reduce_max_sync(half, static_cast<unsigned>(value));
  row[4] = __reduce_and_sync(half, lane | 4);
  row[5] = __reduce_or_sync(half, lane);
  row[6] = __reduce_xor_sync(kAllLanes, lane * lane);
  row[7] = __match_any_sync(kAllLanes, lane % 3);
  row[8] = __match_all_sync(half, lane / 16, &same) + static_cast<unsigned>(same);
  row[9] = __match_all_sync(half, lane, &same) + static_cast<unsigned>(same);
  row[10] = __ballot_sync(half, value < 0);
  row[11] = __shfl_up_sync(kAllLanes, lane, 3, 16);
}

// A ring of stages, filled ahead; the tail of the last one is zero.
__global__ void staged_copy(Buffers b) {
  constexpr int kStages = 3, kUnit = 4;
  BATCHOPS_SHARED(ring, float4[kStages][kBlock]);
  const int units = (b.n + kUnit - 1) / kUnit;
  const int rounds = (units + kBlock - 1) / kBlock;
  const auto fetch = [&](int round) {
    const int unit = round * kBlock + static_cast<int>(threadIdx.x);
    if (round < rounds && unit < units) {
      const int missing = unit * kUnit + kUnit > b.n ? unit * kUnit + kUnit - b.n : 0;
      __pipeline_memcpy_async(&ring[round % kStages][threadIdx.x], b.in + unit * kUnit,
                              sizeof(float4), static_cast<size_t>(missing) * sizeof(float));
    }
    __pipeline_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) fetch(s);
  for (int round = 0; round < rounds; ++round) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    const int unit = round * kBlock + static_cast<int>(threadIdx.x);
    // A neighbour's copy, so that the barrier counts.
    const int from = static_cast<int>(threadIdx.x) ^ 1;
    const int other = round * kBlock + from;
    if (unit < units && other < units) {
      reinterpret_cast<float4*>(b.out)[other] = ring[round % kStages][from];
    }
    __syncthreads();
    fetch(round + kStages - 1);
  }
}

// ---- atomics

template <class T>
BATCHOPS_DEVICE void integer_atomics(T* at, T i) {
  atomicAdd(at + 0, i);
  atomicMin(at + 1, i);
  atomicMax(at + 2, i);
  atomicAnd(at + 3, i);
  atomicOr(at + 4, i);
  atomicXor(at + 5, i);
  atomicAdd_block(at + 6, i);
  atomicAdd_system(at + 7, i);
  atomicMax_block(at + 8, i);
  atomicOr_system(at + 9, i);
  // A sum by compare-and-swap.
  T seen = at[10];
  for (T before = ~seen; seen != before;) {
    before = seen;
    seen = atomicCAS(at + 10, before, before + i);
  }
  seen = atomicExch(at + 11, i);
}

__global__ void old_atomics(Buffers b) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x + 1;
  integer_atomics<unsigned>(b.words, i);
  integer_atomics<int>(reinterpret_cast<int*>(b.words) + 16, static_cast<int>(i));
  integer_atomics<unsigned long long>(b.wide, i);
  atomicSub(b.words + 32, i);
  atomicInc(b.words + 33, 4u);
  atomicDec(b.words + 34, 4u);
  atomicSub_system(reinterpret_cast<int*>(b.words) + 35, static_cast<int>(i));
  atomicAdd(b.out, static_cast<float>(i));
  atomicAdd_block(b.out + 1, static_cast<float>(i));
  atomicAdd(b.doubles, static_cast<double>(i));
  atomicAdd_system(b.doubles + 1, static_cast<double>(i));
  atomicAdd(reinterpret_cast<__half2*>(b.out + 2), __floats2half2_rn(1.0f, 2.0f));
  atomicAdd(reinterpret_cast<__half*>(b.out + 3), __float2half_rn(1.0f));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  atomicAdd(reinterpret_cast<__nv_bfloat162*>(b.out + 4), __floats2bfloat162_rn(1.0f, 2.0f));
  atomicAdd(reinterpret_cast<__nv_bfloat16*>(b.out + 5), __float2bfloat16_rn(1.0f));
#endif
}

// A lock, tickets and every operation with an order and a scope.
__global__ void ordered_atomics(Buffers b) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x + 1;
  unsigned* w = b.words;
  __nv_atomic_fetch_add(w + 0, i, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_sub(w + 1, i, __NV_ATOMIC_ACQ_REL, __NV_THREAD_SCOPE_SYSTEM);
  __nv_atomic_fetch_or(w + 2, i, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_xor(w + 3, i, __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_max(w + 4, i, __NV_ATOMIC_SEQ_CST, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_min(w + 5, i, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_and(w + 6, i, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_add(b.wide, static_cast<unsigned long long>(i), __NV_ATOMIC_RELAXED,
                  __NV_THREAD_SCOPE_DEVICE);
  __nv_atomic_fetch_add(b.out, static_cast<float>(i), __NV_ATOMIC_RELAXED,
                        __NV_THREAD_SCOPE_DEVICE);
  // Under the lock: a plain sum. Lanes of a warp take turns, since all leave the loop by a break.
  for (bool done = false; !done;) {
    unsigned open = 0;
    if (__nv_atomic_compare_exchange_n(w + 7, &open, 1u, false, __NV_ATOMIC_ACQUIRE,
                                       __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE)) {
      *static_cast<volatile unsigned*>(w + 8) = *static_cast<volatile unsigned*>(w + 8) + i;
      __nv_atomic_store_n(w + 7, 0u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
      done = true;
    }
  }
  unsigned before = 0;
  __nv_atomic_load(w + 8, &before, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_BLOCK);
  if (before < i) __nv_atomic_store_n(w + 9, 1u, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
  if (__nv_atomic_exchange_n(w + 10, i, __NV_ATOMIC_ACQ_REL, __NV_THREAD_SCOPE_DEVICE) == 0) {
    __nv_atomic_add(w + 11, 1u, __NV_ATOMIC_RELAXED, __NV_THREAD_SCOPE_DEVICE);
  }
  __nv_atomic_thread_fence(__NV_ATOMIC_SEQ_CST, __NV_THREAD_SCOPE_DEVICE);
}

// ---- launches

struct Entry {
  const char* name;
  void (*kernel)(Buffers);
  LaunchShape shape;
};

LaunchShape shape(dim3 blocks, dim3 threads = dim3(kBlock)) { return {blocks, threads}; }
LaunchShape cooperative(dim3 blocks) { return {blocks, dim3(kBlock), 0, 1, true}; }
LaunchShape clustered(unsigned blocks, unsigned cluster, size_t shared = 0) {
  return {dim3(blocks), dim3(kBlock), shared, cluster, false};
}

const Entry kEntries[] = {
    {"grid_sum", grid_sum, cooperative(dim3(6))},
    {"grid_sum_in_halves", grid_sum_in_halves, cooperative(dim3(6))},
    {"channel_sum_acquire", channel_sum<Spin::acquire>, cooperative(dim3(3, 4))},
    {"channel_sum_update", channel_sum<Spin::update>, cooperative(dim3(3, 4))},
    {"channel_sum_polite", channel_sum<Spin::polite_volatile>, cooperative(dim3(3, 4))},
    {"channel_sum_bare", channel_sum<Spin::bare_volatile>, cooperative(dim3(3, 1))},
    {"last_block_sum", last_block_sum, shape(dim3(7))},
    {"dimensions", dimensions, shape(dim3(3, 2, 4), dim3(5, 3, 2))},
    {"cluster_sum_by_pull", cluster_sum_by_pull, clustered(8, 4)},
    {"cluster_sum_by_push", cluster_sum_by_push, clustered(8, 4, 64)},
    {"cluster_sum_of_sixteen", cluster_sum_by_pull, clustered(32, 16)},
    {"cluster_identity", cluster_identity, clustered(6, 3)},
    {"producer_and_consumer", producer_and_consumer, shape(dim3(2), dim3(4 * kWarp))},
    {"block_votes", block_votes, shape(dim3(1))},
    {"warp_operations", warp_operations, shape(dim3(1), dim3(kWarp))},
    {"staged_copy", staged_copy, shape(dim3(1))},
    {"old_atomics", old_atomics, shape(dim3(3))},
    {"ordered_atomics", ordered_atomics, shape(dim3(3))},
};

const char* run_feature(const char* name, const Buffers& buffers, void* stream) {
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0) {
      return launch(name, entry.kernel, entry.shape, stream, buffers);
    }
  }
  return message("no feature %s", name);
}

// ---- streams

__global__ void add_one(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] += 1.0f;
}

__global__ void times_three(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = in[i] * 3.0f;
}

// out = (in + 1) · 3, the sum in one stream and the product in another. `event`: as it should be.
const char* two_streams(const Buffers& b, bool event) {
  const char* op = "two_streams";
  const size_t bytes = static_cast<size_t>(b.n) * sizeof(float);
  float* sum = b.out + b.n;
  cudaStream_t first = nullptr, second = nullptr;
  cudaEvent_t done = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaMemsetAsync(b.out, 0, bytes, second);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(sum, b.in, bytes, cudaMemcpyDeviceToDevice, first);
  }
  const char* failed = check(op, "streams", error);
  if (failed == nullptr) failed = launch("add_one", add_one, 2, kBlock, 0, first, sum, b.n);
  if (failed == nullptr && event) {
    failed = check(op, "cudaEventRecord", cudaEventRecord(done, first));
    if (failed == nullptr) {
      failed = check(op, "cudaStreamWaitEvent", cudaStreamWaitEvent(second, done, 0));
    }
  }
  if (failed == nullptr) {
    failed = launch("times_three", times_three, 2, kBlock, 0, second, sum, b.out, b.n);
  }
  if (failed == nullptr) {
    failed = check(op, "cudaStreamSynchronize", cudaStreamSynchronize(second));
  }
  cudaEventDestroy(done);
  cudaStreamDestroy(first);
  cudaStreamDestroy(second);
  return failed;
}

// What the host may ask about a kernel: blocks the device holds, clusters, launch bounds,
// registers.
__global__ void __launch_bounds__(96, 2) bounded(Buffers b) { b.words[threadIdx.x] = 1; }

const char* ask_host(const Buffers& b) {
  int64_t blocks = 0;
  int clusters = 0;
  const LaunchShape wide{dim3(8), dim3(96), 100 * 1024, 4};
  if (const char* error = resident_blocks("bounded", bounded, wide, 0, &blocks)) return error;
  if (const char* error = resident_clusters("bounded", bounded, wide, &clusters)) return error;
  cudaFuncAttributes attributes{};
  const char* error =
      check("bounded", "cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, bounded));
  b.words[0] = static_cast<unsigned>(blocks);
  b.words[1] = static_cast<unsigned>(clusters);
  b.words[2] = static_cast<unsigned>(attributes.maxThreadsPerBlock);
  b.words[3] = static_cast<unsigned>(attributes.numRegs);
  b.words[4] = static_cast<unsigned>(attributes.maxDynamicSharedSizeBytes);
  return error;
}

}  // namespace

#ifdef BATCHOPS_CUDA_EMULATOR
EMULATOR_EXPORT int emulated_feature(const char* name, const Buffers* buffers, char* text,
                                     size_t size) {
  return cuda_emulator::guarded(text, size, [&] { return run_feature(name, *buffers, nullptr); });
}

EMULATOR_EXPORT int emulated_two_streams(const Buffers* buffers, bool event, char* text,
                                         size_t size) {
  return cuda_emulator::guarded(text, size, [&] { return two_streams(*buffers, event); });
}

EMULATOR_EXPORT int emulated_ask_host(const Buffers* buffers, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&] { return ask_host(*buffers); });
}
#else
// So that nvcc keeps the code.
const char* feature_on_device(const char* name, const Buffers& b, void* stream) {
  if (const char* error = two_streams(b, true)) return error;
  if (const char* error = ask_host(b)) return error;
  return run_feature(name, b, stream);
}
#endif
