// Kernels with a data race each, beside the sound patterns that they fall short of. The tests look
// the lines of "race:" comments up and want them in the report: the earlier and the later access
// may come in either order.
#include "race_faults.h"

#include "kernels/cuda/reduce.cuh"

using namespace race_faults;

namespace {

// ---- shared memory

template <bool kSound>
__global__ void reverse(Data d) {
  BATCHOPS_SHARED(tile, float[kBlock]);
  tile[threadIdx.x] = d.in[position()];  // race: tile written
  if (kSound) __syncthreads();
  d.out[position()] = tile[kBlock - 1 - threadIdx.x];  // race: tile read
}

template <bool kSound>
__global__ void reverse_dynamic(Data d) {
  BATCHOPS_DYNAMIC_SHARED(tile, float);
  tile[threadIdx.x] = d.in[position()];  // race: dynamic written
  if (kSound) __syncthreads();
  d.out[position()] = tile[kBlock - 1 - threadIdx.x];  // race: dynamic read
}

// The second round's writes overtake the first round's reads.
template <bool kSound>
__global__ void reuse(Data d) {
  BATCHOPS_SHARED(sums, float[kBlock / kWarp]);
  float total = 0.0f;
  for (int round = 0; round < 3; ++round) {
    const float sum = warp_sum(d.in[position()]);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;  // race: sums written
    __syncthreads();
    total += sums[0] + sums[1];  // race: sums read
    if (kSound) __syncthreads();
  }
  d.out[position()] = total;
}

// Lanes hand values on through shared memory. A shuffle makes them meet and orders nothing.
template <bool kSound>
__global__ void between_lanes(Data d) {
  BATCHOPS_SHARED(lanes, float[kBlock]);
  lanes[threadIdx.x] = d.in[position()];  // race: lanes written
  float other = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  if (kSound) __syncwarp();
  other *= lanes[threadIdx.x ^ 1];  // race: lanes read
  d.out[position()] = other;
}

template <bool kSound>
__global__ void tree(Data d) {
  BATCHOPS_SHARED(level, float[kBlock]);
  level[threadIdx.x] = d.in[position()];
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      level[threadIdx.x] += level[threadIdx.x + half];  // race: level
    }
    if (kSound || half < 8) __syncthreads();
  }
  if (threadIdx.x == 0) d.out[blockIdx.x] = level[0];
}

// Two buffers take turns, so that one barrier a round is enough; one buffer is not.
template <bool kSound>
__global__ void double_buffer(Data d) {
  BATCHOPS_SHARED(stage, float[2][kBlock]);
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    const int slot = kSound ? round % 2 : 0;
    stage[slot][threadIdx.x] = d.in[position()];  // race: stage written
    __syncthreads();
    sum += stage[slot][(threadIdx.x + 32) % kBlock];  // race: stage read
  }
  d.out[position()] = sum;
}

// Three lanes read what a fourth overwrites; it has met all of them, or all but the one between.
template <bool kSound>
__global__ void three_readers(Data d) {
  BATCHOPS_SHARED(word, float);
  if (threadIdx.x == 3) word = d.in[position()];
  __syncthreads();
  if (threadIdx.x > 3) return;
  if (threadIdx.x < 3) d.out[position()] = word;  // race: word read
  if (kSound || threadIdx.x != 1) __syncwarp(kSound ? 0b1111u : 0b1101u);
  if (threadIdx.x == 3) word = 1.0f;  // race: word overwritten
}

// Two neighbours write the halves of one word.
__global__ void neighbours(Data d) {
  BATCHOPS_SHARED(halves, __half[kBlock]);
  halves[threadIdx.x] = __float2half_rn(d.in[position()]);
  d.out[position()] = __half2float(halves[threadIdx.x]);
}

// ---- global memory

template <bool kSound>
__global__ void overlapping_blocks(Data d) {
  const int i = kSound ? position() : static_cast<int>(threadIdx.x);
  d.out[i] = d.in[i];  // race: out
}

// The last block to come adds up what all have left. `kThread0Fences`: one fence stands for the
// block's writes, before the counter and after it; else every thread has its own, on the far sides
// of the barriers.
template <bool kFenceBefore, bool kFenceAfter, bool kThread0Fences>
__global__ void last_block_adds_up(Data d) {
  BATCHOPS_SHARED(last, bool);
  d.partial[position()] = d.in[position()];  // race: partial written
  if (kFenceBefore && !kThread0Fences) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kFenceBefore && kThread0Fences) __threadfence();
    last = atomicAdd(d.flags, 1u) == gridDim.x - 1;
    if (kFenceAfter && kThread0Fences) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (kFenceAfter && !kThread0Fences) __threadfence();
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    sum += d.partial[b * kBlock + threadIdx.x];  // race: partial read
  }
  d.out[threadIdx.x] = sum;
  if (threadIdx.x == 0) d.flags[0] = 0;  // for the next launch
}

// A fence that reaches the own block only.
__global__ void block_fence(Data d) {
  if (threadIdx.x != 0) return;
  d.partial[blockIdx.x] = 1.0f;  // race: block fence written
  __threadfence_block();
  if (atomicAdd(d.flags, 1u) != gridDim.x - 1) return;
  __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) {
    d.out[b] = d.partial[b];  // race: block fence read
  }
}

__global__ void plain_read_of_an_atomic(Data d) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    atomicAdd(d.flags, 1u);  // race: counter added
  } else {
    d.out[blockIdx.x] = static_cast<float>(d.flags[0]);  // race: counter read
  }
}

__global__ void counting(Data d) { atomicAdd(d.flags, 1u); }

// The block that sets the counter has gone on to count by the time another comes.
template <bool kSound>
__global__ void counter_set_by_one(Data d) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    if (kSound) {
      atomicExch(d.flags, 0u);
    } else {
      d.flags[0] = 0;  // race: counter set
    }
  }
  atomicAdd(d.flags, 1u);  // race: counted
}

// Each block looks before it counts, and must do so in a way that counts as looking.
template <bool kSound>
__global__ void look_and_count(Data d) {
  if (threadIdx.x != 0) return;
  unsigned seen = 0;
  if (kSound) {
    seen = *static_cast<volatile unsigned*>(d.flags);
  } else {
    seen = d.flags[0];  // race: looked
  }
  atomicAdd(d.flags, 1u);  // race: then counted
  d.out[blockIdx.x] = static_cast<float>(seen);
}

// A flag behind a fence, as volatile accesses; blocks run in order here, so it is up when block 1
// looks.
template <bool kSound>
__global__ void volatile_flag(Data d) {
  volatile unsigned* flag = d.flags;
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    d.partial[0] = 1.0f;  // race: published
    if (kSound) __threadfence();
    *flag = 1;
  } else if (*flag != 0) {
    __threadfence();
    d.out[blockIdx.x] = d.partial[0];  // race: consumed
  }
}

constexpr Entry kEntries[] = {
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"reverse_dynamic", reverse_dynamic<true>, kBlock * sizeof(float)},
    {"reverse_dynamic_without_barrier", reverse_dynamic<false>, kBlock * sizeof(float)},
    {"reuse", reuse<true>},
    {"reuse_without_barrier", reuse<false>},
    {"between_lanes", between_lanes<true>},
    {"between_lanes_without_syncwarp", between_lanes<false>},
    {"tree", tree<true>},
    {"tree_without_barriers", tree<false>},
    {"double_buffer", double_buffer<true>},
    {"single_buffer", double_buffer<false>},
    {"three_readers", three_readers<true>},
    {"three_readers_of_whom_two_meet_the_writer", three_readers<false>},
    {"neighbours", neighbours},
    {"own_elements", overlapping_blocks<true>},
    {"overlapping_blocks", overlapping_blocks<false>},
    {"last_block_thread_0_fences", last_block_adds_up<true, true, true>},
    {"last_block_all_fence", last_block_adds_up<true, true, false>},
    {"last_block_without_fence_before", last_block_adds_up<false, true, true>},
    {"last_block_without_fence_after", last_block_adds_up<true, false, true>},
    {"block_fence", block_fence},
    {"plain_read_of_an_atomic", plain_read_of_an_atomic},
    {"counting", counting},
    {"counter_exchanged", counter_set_by_one<true>},
    {"counter_set_by_one", counter_set_by_one<false>},
    {"volatile_look_and_count", look_and_count<true>},
    {"plain_look_and_count", look_and_count<false>},
    {"volatile_flag", volatile_flag<true>},
    {"volatile_flag_without_fence", volatile_flag<false>},
};

}  // namespace

EMULATOR_EXPORT int emulated_race(const char* name, const Data* data, int blocks, char* text,
                                  size_t size) {
  return run(kEntries, name, *data, blocks, text, size);
}
