// Kernels with one fault each in what faults.cu leaves out: waits between blocks, clusters, named
// barriers, asynchronous copies, memory and launches. The tests look the line of a "fault:" comment
// up and want it in the error.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <cstring>

#include "control.h"
#include "kernels/cuda/runtime.cuh"

using namespace batchops::cuda;
namespace cg = cooperative_groups;

namespace {

constexpr int kBlock = 64;

// ---- waits

// Sound where both blocks are resident; for ever where block 0 keeps block 1 from starting.
__global__ void wait_for_a_later_block(const float*, float* out, unsigned* words) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    while (atomicAdd(words, 0u) == 0) {  // fault: later block
    }
    __threadfence();
    out[0] = 1.0f;
  } else {
    __nv_atomic_store_n(words, 1u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
  }
}

__global__ void wait_for_one_arrival_too_many(const float*, float* out, unsigned* words) {
  if (threadIdx.x == 0) {
    atomicAdd(words, 1u);
    while (atomicAdd(words, 0u) <= gridDim.x) __nanosleep(20);  // fault: too many
  }
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void volatile_wait_for_nobody(const float*, float* out, unsigned* words) {
  volatile unsigned* flag = words;
  while (*flag == 0) {  // fault: volatile
  }
  out[threadIdx.x] = 1.0f;
}

// Each look at the flag meets a barrier, as where one thread looks for all.
__global__ void wait_with_a_barrier_in_the_loop(const float*, float* out, unsigned* words) {
  BATCHOPS_SHARED(seen, unsigned);
  do {
    if (threadIdx.x == 0) seen = atomicAdd(words, 0u);  // fault: looks
    __syncthreads();
  } while (seen == 0);
  out[threadIdx.x] = 1.0f;
}

// Two spins that wait for each other.
__global__ void crossed_wait(const float*, float* out, unsigned* words) {
  if (threadIdx.x != 0) return;
  while (atomicAdd(words + (1 - blockIdx.x), 0u) == 0) {  // fault: crossed
  }
  atomicExch(words + blockIdx.x, 1u);
  out[0] = 1.0f;
}

// ---- grids

__global__ void grid_sync(const float*, float* out, unsigned*) {
  cg::this_grid().sync();  // fault: not cooperative
  out[threadIdx.x] = 1.0f;
}

__global__ void divergent_grid_sync(const float*, float* out, unsigned*) {
  if (threadIdx.x < kWarp) {
    cg::this_grid().sync();  // fault: one sync
  } else {
    cg::this_grid().sync();  // fault: other sync
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void grid_sync_after_exit(const float*, float* out, unsigned*) {
  if (blockIdx.x == 1 && threadIdx.x >= kWarp) return;
  cg::this_grid().sync();  // fault: sync after exit
  out[threadIdx.x] = 1.0f;
}

__global__ void grid_sync_against_a_barrier(const float*, float* out, unsigned*) {
  if (threadIdx.x < kWarp) {
    cg::this_grid().sync();  // fault: sync
  } else {
    __syncthreads();  // fault: barrier
  }
  out[threadIdx.x] = 1.0f;
}

// ---- clusters

// kFault 0: none. 1: the owner may have exited. 2: the owner may not have started.
template <int kFault>
__global__ void read_of_the_neighbour(const float* in, float* out, unsigned*) {
  const cg::cluster_group cluster = cg::this_cluster();
  BATCHOPS_SHARED(value, float);
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  const float* there = cluster.map_shared_rank(&value, static_cast<int>(next));
  if (kFault != 2) {
    if (threadIdx.x == 0) value = in[cluster.block_rank()];
    cluster.sync();
  }
  if (kFault == 1 && cluster.block_rank() == 1) return;
  if (kFault == 1) {
    for (int i = 0; i < 4; ++i) __nanosleep(20);
  }
  const float got = *there;  // fault: neighbour
  if (kFault == 0) cluster.sync();
  if (threadIdx.x == 0) out[cluster.block_rank()] = got;
}

__global__ void map_of_an_exited_block(const float*, float* out, unsigned*) {
  const cg::cluster_group cluster = cg::this_cluster();
  BATCHOPS_SHARED(value, float);
  if (threadIdx.x == 0) value = 1.0f;
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  for (int i = 0; i < 4; ++i) __nanosleep(20);
  out[0] = *cluster.map_shared_rank(&value, 1);  // fault: exited owner
}

__global__ void map_past_the_cluster(const float*, float* out, unsigned*) {
  BATCHOPS_SHARED(value, float);
  out[0] = *cg::this_cluster().map_shared_rank(&value, 2);  // fault: rank
}

__global__ void map_of_global_memory(const float*, float* out, unsigned*) {
  out[0] = *cg::this_cluster().map_shared_rank(out, 1);  // fault: not shared
}

__global__ void two_arrivals(const float*, float*, unsigned*) {
  __cluster_barrier_arrive();
  __cluster_barrier_arrive();  // fault: second arrival
  __cluster_barrier_wait();
}

__global__ void wait_without_arrival(const float*, float*, unsigned*) {
  __cluster_barrier_wait();  // fault: no arrival
}

// ---- named barriers

__global__ void barrier_of_part_of_a_warp(const float*, float*, unsigned*) {
  __barrier_sync_count(1, 48);  // fault: 48 threads
}

__global__ void barrier_seventeen(const float*, float*, unsigned*) {
  __barrier_sync(16);  // fault: seventeenth
}

__global__ void two_sizes_of_one_barrier(const float*, float*, unsigned*) {
  __barrier_sync_count(1, threadIdx.x < kWarp ? 32 : 64);  // fault: sizes
  __barrier_sync_count(1, threadIdx.x < kWarp ? 64 : 32);  // fault: more sizes
}

__global__ void consumer_without_producer(const float*, float*, unsigned*) {
  if (threadIdx.x < kWarp) __barrier_sync_count(3, 2 * kWarp);  // fault: alone
}

// ---- asynchronous copies

enum class Copy { sound, no_wait, no_commit, one_too_few, early_overwrite };

template <Copy kCopy>
__global__ void copies(const float* in, float* out, unsigned*) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  __pipeline_memcpy_async(&tile[threadIdx.x], in + threadIdx.x, sizeof(float));
  if (kCopy != Copy::no_commit) __pipeline_commit();
  if (kCopy == Copy::early_overwrite) const_cast<float*>(in)[threadIdx.x] = -1.0f;
  if (kCopy != Copy::no_wait) __pipeline_wait_prior(kCopy == Copy::one_too_few ? 1 : 0);
  __syncthreads();
  out[threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

__global__ void copy_of_twelve_bytes(const float* in, float*, unsigned*) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  __pipeline_memcpy_async(tile, in, 12);  // fault: twelve
}

__global__ void copy_from_a_misaligned_source(const float* in, float*, unsigned*) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  __pipeline_memcpy_async(tile, in + 1, 16);  // fault: misaligned source
}

__global__ void copy_to_a_misaligned_place(const float* in, float*, unsigned*) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  __pipeline_memcpy_async(tile + 1, in, 16);  // fault: misaligned place
}

__global__ void copy_to_global_memory(const float* in, float* out, unsigned*) {
  __pipeline_memcpy_async(out, in, 4);  // fault: not to shared
}

// ---- memory

__global__ void read_of_no_memory(const float* in, float* out, unsigned*) {
  out[threadIdx.x] = in[(int64_t{1} << 45) + threadIdx.x];  // fault: far away
}

int deep(int n) {
  volatile char room[2048];
  room[0] = static_cast<char>(n);
  return n == 0 ? 0 : deep(n - 1) + room[0];  // fault: deep
}
__global__ void too_deep(const float*, float* out, unsigned*) {
  out[threadIdx.x] = static_cast<float>(deep(100));
}

__global__ void misaligned_atomic(const float*, float*, unsigned* words) {
  atomicAdd(reinterpret_cast<unsigned long long*>(words + 1), 1ull);  // fault: misaligned atomic
}

// ---- launches

__global__ void plain(const float* in, float* out, unsigned*) {
  out[threadIdx.x % kBlock] = in[threadIdx.x % kBlock];
}
__global__ void __launch_bounds__(128) bounded(const float* in, float* out, unsigned*) {
  out[threadIdx.x % kBlock] = in[threadIdx.x % kBlock];
}

struct Entry {
  const char* name;
  void (*kernel)(const float*, float*, unsigned*);
  LaunchShape shape;
};

LaunchShape shape(unsigned blocks, unsigned threads = kBlock) {
  return {dim3(blocks), dim3(threads)};
}
LaunchShape cooperative(unsigned blocks) { return {dim3(blocks), dim3(kBlock), 0, 1, true}; }
LaunchShape clustered(unsigned blocks, unsigned cluster) {
  return {dim3(blocks), dim3(kBlock), 0, cluster, false};
}

const Entry kEntries[] = {
    {"wait_for_a_later_block", wait_for_a_later_block, shape(2)},
    {"wait_for_one_arrival_too_many", wait_for_one_arrival_too_many, cooperative(3)},
    {"volatile_wait_for_nobody", volatile_wait_for_nobody, shape(1, 1)},
    {"wait_with_a_barrier_in_the_loop", wait_with_a_barrier_in_the_loop, shape(1, kWarp)},
    {"crossed_wait", crossed_wait, cooperative(2)},
    {"grid_sync_not_cooperative", grid_sync, shape(2)},
    {"grid_sync_too_large", grid_sync, cooperative(5000)},
    {"divergent_grid_sync", divergent_grid_sync, cooperative(2)},
    {"grid_sync_after_exit", grid_sync_after_exit, cooperative(2)},
    {"grid_sync_against_a_barrier", grid_sync_against_a_barrier, cooperative(1)},
    {"read_of_the_neighbour", read_of_the_neighbour<0>, clustered(2, 2)},
    {"read_of_an_exited_neighbour", read_of_the_neighbour<1>, clustered(2, 2)},
    {"read_of_an_unborn_neighbour", read_of_the_neighbour<2>, clustered(2, 2)},
    {"map_of_an_exited_block", map_of_an_exited_block, clustered(2, 2)},
    {"map_past_the_cluster", map_past_the_cluster, clustered(2, 2)},
    {"map_of_global_memory", map_of_global_memory, clustered(2, 2)},
    {"two_arrivals", two_arrivals, clustered(2, 2)},
    {"wait_without_arrival", wait_without_arrival, clustered(2, 2)},
    {"cluster_of_seventeen", plain, clustered(34, 17)},
    {"cluster_that_does_not_divide", plain, clustered(7, 2)},
    {"barrier_of_part_of_a_warp", barrier_of_part_of_a_warp, shape(1)},
    {"barrier_seventeen", barrier_seventeen, shape(1)},
    {"two_sizes_of_one_barrier", two_sizes_of_one_barrier, shape(1)},
    {"consumer_without_producer", consumer_without_producer, shape(1, 4 * kWarp)},
    {"copy", copies<Copy::sound>, shape(1)},
    {"copy_without_wait", copies<Copy::no_wait>, shape(1)},
    {"copy_without_commit", copies<Copy::no_commit>, shape(1)},
    {"copy_with_a_wait_for_too_few", copies<Copy::one_too_few>, shape(1)},
    {"copy_whose_source_changes", copies<Copy::early_overwrite>, shape(1)},
    {"copy_of_twelve_bytes", copy_of_twelve_bytes, shape(1)},
    {"copy_from_a_misaligned_source", copy_from_a_misaligned_source, shape(1)},
    {"copy_to_a_misaligned_place", copy_to_a_misaligned_place, shape(1)},
    {"copy_to_global_memory", copy_to_global_memory, shape(1)},
    {"read_of_no_memory", read_of_no_memory, shape(1)},
    {"too_deep", too_deep, shape(1)},
    {"misaligned_atomic", misaligned_atomic, shape(1)},
    {"plain", plain, shape(1, 512)},
    {"plain_of_256", plain, shape(1, 256)},
    {"bounded", bounded, shape(1, 128)},
    {"bounded_by_fewer", bounded, shape(1, 160)},
    {"block_of_none", plain, shape(1, 0)},
    {"grid_of_none", plain, shape(0)},
};

// ---- calls of the host that the runtime refuses

const char* shared_not_asked_for(float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = 48 * 1024 + 16;
  unsigned* words = nullptr;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, plain, out, out, words);  // fault: not asked
  return check("plain", "launch", error);
}

__global__ void both_kinds_of_shared(const float*, float* out, unsigned*) {
  BATCHOPS_SHARED(kept, float[4]);  // fault: static and dynamic
  BATCHOPS_DYNAMIC_SHARED(tile, float);
  if (threadIdx.x < 4) kept[threadIdx.x] = tile[threadIdx.x] = 0;
  out[threadIdx.x] = 0;
}

// What is static counts as well; the first launch and the second.
const char* static_and_dynamic_not_asked_for(float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = 48 * 1024;
  unsigned* words = nullptr;
  const cudaError_t error = cudaLaunchKernelEx(&config, both_kinds_of_shared, out, out, words);
  return check("both_kinds_of_shared", "launch", error);
}

const char* static_and_dynamic_asked_for(float* out) {
  unsigned* words = nullptr;
  return launch("both_kinds_of_shared", both_kinds_of_shared, 1, kBlock, 48 * 1024, nullptr, out,
                out, words);
}

const char* occupancy_of_no_threads(float*) {
  int64_t blocks = 0;
  return resident_blocks("plain", plain, shape(1, 0), 0, &blocks);  // fault: no threads
}

const char* occupancy_of_wide_clusters(float*) {
  int clusters = 0;
  return resident_clusters("plain", plain, clustered(34, 17), &clusters);  // fault: wide clusters
}

const char* unknown_attribute(float*) {
  int value = 0;
  const auto error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxPitch, 0);  // fault: attribute
  return check("unknown_attribute", "cudaDeviceGetAttribute", error);
}

const char* launch_in_no_stream(float* out) {
  static char nowhere;
  unsigned* words = nullptr;
  return launch("plain", plain, 1, kBlock, 0, &nowhere, out, out, words);  // fault: no stream
}

// One refused call is handled; what fails then is something else.
const char* a_refusal_that_is_handled(float* out) {
  if (launch_in_no_stream(out) == nullptr) return "not refused";
  return "a_refusal_that_is_handled: something else";
}

struct HostEntry {
  const char* name;
  const char* (*function)(float*);
};

constexpr HostEntry kHostEntries[] = {
    {"shared_not_asked_for", shared_not_asked_for},
    {"static_and_dynamic_not_asked_for", static_and_dynamic_not_asked_for},
    {"static_and_dynamic_asked_for", static_and_dynamic_asked_for},
    {"occupancy_of_no_threads", occupancy_of_no_threads},
    {"occupancy_of_wide_clusters", occupancy_of_wide_clusters},
    {"unknown_attribute", unknown_attribute},
    {"launch_in_no_stream", launch_in_no_stream},
    {"a_refusal_that_is_handled", a_refusal_that_is_handled},
};

const char* run(const Entry& e, const float* in, float* out, unsigned* words) {
  return launch(e.name, e.kernel, e.shape, nullptr, in, out, words);  // fault: launch
}

}  // namespace

EMULATOR_EXPORT int emulated_fault(const char* name, const float* in, float* out, unsigned* words,
                                   char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) == 0) return run(entry, in, out, words);
    }
    for (const HostEntry& entry : kHostEntries) {
      if (std::strcmp(entry.name, name) == 0) return entry.function(out);
    }
    return "no such kernel";
  });
}
