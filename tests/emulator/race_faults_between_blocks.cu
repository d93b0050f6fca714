// More kernels with a data race each, beside the sound patterns: blocks that wait for each other,
// scopes, clusters, cooperative grids, and asynchronous copies.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "race_faults.h"

using namespace race_faults;

namespace {

// Block 0 publishes, the others spin. The kinds of flag that are sound, and what is missing where
// they are not.
enum class Flag { release_acquire, fences, relaxed_store, relaxed_load, wrong_scope };

template <Flag kFlag>
__global__ void spin_on_a_flag(Data d) {
  if (threadIdx.x != 0) return;
  constexpr bool kRelaxedStore = kFlag == Flag::fences || kFlag == Flag::relaxed_store;
  constexpr bool kRelaxedLoad = kFlag == Flag::fences || kFlag == Flag::relaxed_load;
  constexpr int kScope =
      kFlag == Flag::wrong_scope ? __NV_THREAD_SCOPE_BLOCK : __NV_THREAD_SCOPE_DEVICE;
  if (blockIdx.x == 0) {
    d.partial[0] = 1.0f;  // race: data published
    if (kFlag == Flag::fences) __threadfence();
    __nv_atomic_store_n(d.flags, 1u, kRelaxedStore ? __NV_ATOMIC_RELAXED : __NV_ATOMIC_RELEASE,
                        kScope);  // race: flag up
    return;
  }
  while (__nv_atomic_load_n(d.flags, kRelaxedLoad ? __NV_ATOMIC_RELAXED : __NV_ATOMIC_ACQUIRE,
                            kScope) == 0) {  // race: flag seen
    __nanosleep(20);
  }
  if (kFlag == Flag::fences) __threadfence();
  d.out[blockIdx.x] = d.partial[0];  // race: data consumed
}

// All blocks meet, and thread 0 of each looks for the others in a loop that never gives way.
template <bool kSound>
__global__ void bare_volatile_wait(Data d) {
  d.partial[position()] = d.in[position()];  // race: volatile wait written
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kSound) __threadfence();
    atomicAdd(d.flags, 1u);
    while (*static_cast<volatile unsigned*>(d.flags) < gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
  d.out[position()] = d.partial[(position() + kBlock) % (gridDim.x * kBlock)];  // race: met
}

__global__ void volatile_wait_for_nobody(Data d) {
  if (threadIdx.x != 0 || blockIdx.x != 0) return;
  while (*static_cast<volatile unsigned*>(d.flags) == 0) {  // fault: nobody
  }
}

// Every block adds 1; only atomics that reach the other blocks add up.
template <bool kSound>
__global__ void count_blocks(Data d) {
  if (threadIdx.x != 0) return;
  if (kSound) {
    atomicAdd(d.flags, 1u);
  } else {
    atomicAdd_block(d.flags, 1u);  // race: narrow
  }
}

// The threads of a block may well count with its own scope.
__global__ void count_threads(Data d) { atomicAdd_block(d.flags + blockIdx.x, 1u); }

// A lock handed from block to block: compare-and-swap takes it, exchange gives it back.
template <bool kSound>
__global__ void lock(Data d) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(d.flags, 0u, 1u) != 0) __nanosleep(20);
  if (kSound) __threadfence();
  d.out[0] += 1.0f;  // race: guarded
  if (kSound) __threadfence();
  atomicExch(d.flags, 0u);
}

template <bool kSound>
__global__ void grid_wide(Data d) {
  d.partial[position()] = d.in[position()];  // race: grid written
  if (kSound) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  const int count = static_cast<int>(gridDim.x * kBlock);
  d.out[position()] = d.partial[count - 1 - position()];  // race: grid read
}

// Reads the other block's shared memory.
template <bool kSound>
__global__ void distributed(Data d) {
  BATCHOPS_SHARED(mine, float[kBlock]);
  auto cluster = cooperative_groups::this_cluster();
  mine[threadIdx.x] = d.in[position()];  // race: cluster written
  if (kSound) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  const float* theirs =
      cluster.map_shared_rank(&mine[0], static_cast<int>(cluster.block_rank() ^ 1));
  d.out[position()] = theirs[threadIdx.x ^ 1];  // race: cluster read
  cluster.sync();
}

// A cluster's barrier does not wait for threads that have exited, so it orders nothing they did.
template <bool kSound>
__global__ void exit_before_the_barrier(Data d) {
  d.partial[position()] = d.in[position()];  // race: written before the exit
  if (!kSound && threadIdx.x >= kWarp && blockIdx.x % 2 == 1) return;
  cooperative_groups::this_cluster().sync();
  d.out[position()] = d.partial[position() ^ kBlock];  // race: read after the exit
}

// Arrives, does something else, and waits.
template <bool kSound>
__global__ void split_barrier(Data d) {
  auto cluster = cooperative_groups::this_cluster();
  d.partial[position()] = d.in[position()];  // race: split written
  cluster.barrier_arrive();
  if (kSound) cluster.barrier_wait();
  const int other = position() ^ kBlock;
  d.out[position()] = d.partial[other];  // race: split read
  if (!kSound) cluster.barrier_wait();
}

// One warp writes, the other reads: a barrier of their own, and one that only the readers come to.
template <bool kSound>
__global__ void named_barrier(Data d) {
  BATCHOPS_SHARED(words, float[kWarp]);
  const bool writer = threadIdx.x < kWarp;
  if (writer) words[threadIdx.x] = d.in[position()];  // race: named written
  if (kSound) {
    __barrier_sync_count(1, kBlock);
  } else {
    __barrier_sync_count(writer ? 1 : 2, kWarp);
  }
  if (!writer) d.out[position()] = words[kBlock - 1 - threadIdx.x];  // race: named read
}

// Copies two stages ahead. Waits for one batch too few, or lets others read without a barrier.
template <int kPrior, bool kBarrier>
__global__ void pipeline(Data d) {
  BATCHOPS_SHARED(stages, float[2][kBlock]);
  constexpr int kRounds = 4;
  const auto copy = [&](int round) {
    float* to = &stages[round % 2][threadIdx.x];
    const float* from = d.in + position();
    if (round < kRounds) {
      __pipeline_memcpy_async(to, from, sizeof(float));  // race: copied
    }
    __pipeline_commit();
  };
  float sum = 0.0f;
  copy(0);
  for (int round = 0; round < kRounds; ++round) {
    copy(round + 1);
    __pipeline_wait_prior(kPrior);
    if (kBarrier) __syncthreads();
    sum += stages[round % 2][(threadIdx.x + 1) % kBlock];  // race: stage used
    __syncthreads();
  }
  d.out[position()] = sum;
}

constexpr Entry kEntries[] = {
    {"spin_release_acquire", spin_on_a_flag<Flag::release_acquire>},
    {"spin_with_fences", spin_on_a_flag<Flag::fences>},
    {"spin_with_a_relaxed_store", spin_on_a_flag<Flag::relaxed_store>},
    {"spin_with_a_relaxed_load", spin_on_a_flag<Flag::relaxed_load>},
    {"spin_in_the_wrong_scope", spin_on_a_flag<Flag::wrong_scope>},
    {"bare_volatile_wait", bare_volatile_wait<true>},
    {"bare_volatile_wait_without_fence", bare_volatile_wait<false>},
    {"volatile_wait_for_nobody", volatile_wait_for_nobody},
    {"count_blocks", count_blocks<true>},
    {"count_blocks_in_block_scope", count_blocks<false>},
    {"count_threads", count_threads},
    {"lock", lock<true>},
    {"lock_without_fences", lock<false>},
    {"grid_sync", grid_wide<true>, 0, 1, true},
    {"block_barrier_for_the_grid", grid_wide<false>, 0, 1, true},
    {"cluster_sync", distributed<true>, 0, 2},
    {"block_barrier_for_the_cluster", distributed<false>, 0, 2},
    {"cluster_without_exits", exit_before_the_barrier<true>, 0, 2},
    {"exit_before_the_cluster_barrier", exit_before_the_barrier<false>, 0, 2},
    {"split_barrier", split_barrier<true>, 0, 2},
    {"split_barrier_read_too_early", split_barrier<false>, 0, 2},
    {"named_barrier", named_barrier<true>},
    {"two_named_barriers", named_barrier<false>},
    {"pipeline", pipeline<1, true>},
    {"pipeline_waits_too_little", pipeline<2, true>},
    {"pipeline_without_barrier", pipeline<1, false>},
};

}  // namespace

EMULATOR_EXPORT int emulated_race_between_blocks(const char* name, const Data* data, int blocks,
                                                 char* text, size_t size) {
  return run(kEntries, name, *data, blocks, text, size);
}
