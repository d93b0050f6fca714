// An optimizer's step over any number of tensors as one cooperative launch.
//
// Block b takes items b, b + blocks, b + 2·blocks, … of the table. The first sweep over a chunk
// gives its sums, which go to the workspace, and two floats an element, which the block keeps in a
// slot of its shared memory. Who brings the last of a tensor's chunks adds the sums up, in the
// order of the chunks, and publishes the tensor's outcome. Meanwhile the others go on to further
// chunks; when its slots are full, a block waits for the outcome of the tensor it keeps longest,
// makes the second sweep over that chunk from what it has kept, and so frees the slot. Of a tensor
// with more chunks than the slots of all blocks hold, the first ones are not kept: their second
// sweep reads the memory again, back to front, and finds in the L2 cache what lines that nobody
// needs again leave room for. It gives the same bits. While such a tensor's outcome is on its way,
// a block sweeps chunks of the next tensor which, if it is as large, are not kept either.
//
// While a chunk is computed the copies of the next one are under way, into the slot after it and,
// what the slot has no place for, into the stage, which by then has been read. Two warps more do
// what has to wait for memory between blocks: the clerk publishes each chunk's sums, the scout has
// the outcome and the entry ready that a chunk's second sweep needs, and asks memory a turn before
// it needs the answer itself. The sweeping warps meet the scout once a chunk. For the clerk they
// leave the sums, and wait only if it still has to read the ones before.
//
//   sweeping warps   settle | first sweep of chunk k, copies of k + 1   | settle | k + 1 …
//   clerk                   | sums of k - 1                             | sums of k
//   scout                   | factors of k + 1, the outcome it settles  | those of k + 2
//
// A small tensor is one warp's work from the sums to the update. Small tensors come after a block's
// last chunk, and fill the time in which it would wait.
//
// Items go to blocks by turns rather than by tickets: chunks are of one size, a block knows from
// the start how many it will have of a tensor and so which of them to keep, and no chunk waits for
// a trip to a counter.
//
// Nobody waits for ever. All blocks are resident (a cooperative launch). With a clip they all meet
// once, before any of them waits for anything else. After that a block waits for a tensor only when
// it has made the first sweep over all of its own chunks of that tensor and of those before it:
//   settle(), before the sweep over a chunk, makes room for that chunk and for the copies of the
//   next. A block keeps one chunk less of a tensor than it has slots, and two less of one that it
//   does not keep whole. So if the oldest chunk is of the same tensor as the one to sweep, there
//   is room already; else it is of an earlier one. What is swept again is of an earlier tensor
//   too. The scout waits only for tensors before that of the chunk being swept.
// The clerk waits for nobody but the sweeping warps' next sums, and they, then, for none but the
// two: whatever they have left for the clerk is published whether or not they go on. So of the
// tensors without an outcome take the first: nobody who still owes it a chunk is waiting, for
// all that come before it have their outcome.
#pragma once
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cuda/counters.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/grad_squares.cuh"
#include "kernels/optimizer_factors.h"

namespace batchops::cuda::optimizer {

// Blocks of a multiprocessor: while one waits for memory or for the others the second works.
constexpr int kResident = 2;
// Those of kWarps, which sweep, and two more.
constexpr int kClerk = kWarps, kScout = kWarps + 1;
constexpr int kBlock = kThreads + 2 * kWarp;
constexpr int kSlotBytes = 2 * kChunk * static_cast<int>(sizeof(float));
// Static shared memory, of which Step may have so much.
constexpr int kStaticBytes = 1024;
// Chunks whose sums come together before those of the tensor do.
constexpr int32_t kGroup = 128;
// Sets that fit a launch's arguments, of which there are 4 KB.
constexpr int kMaxSets = 32;

// Within a unit in the last place, in one instruction of the special function unit and no branch.
// The formulas take their errors off again. A denormal `b` counts as 0. No root is one, so that
// only a denormal eps·b beside a v of 0 could be.
BATCHOPS_DEVICE float near_sqrt(float a) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return std::sqrt(a) * (1 + 0x1p-23f);  // as far off as the device's may be
#else
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a));
  return root;
#endif
}
BATCHOPS_DEVICE float near_inverse(float b) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return 1 / b * (1 - 0x1p-24f);
#else
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return inverse;
#endif
}

// One float whose operations round once each, so that nothing is contracted; quotients and roots
// are only near.
struct F {
  float v;

  F() = default;
  BATCHOPS_DEVICE explicit F(float value) : v(value) {}
  BATCHOPS_DEVICE friend F operator+(F a, F b) { return F(__fadd_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a, F b) { return F(__fsub_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator*(F a, F b) { return F(__fmul_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator/(F a, F b) { return F(a.v * near_inverse(b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a) { return F(-a.v); }
};
BATCHOPS_DEVICE F fused(F a, F b, F c) { return F(__fmaf_rn(a.v, b.v, c.v)); }
BATCHOPS_DEVICE F sqrt(F a) { return F(near_sqrt(a.v)); }
// Where the formulas take these, a NaN has gone into the sum beside them too.
BATCHOPS_DEVICE F max(F a, F b) { return F(fmaxf(a.v, b.v)); }
BATCHOPS_DEVICE F min(F a, F b) { return F(fminf(a.v, b.v)); }
BATCHOPS_DEVICE F select_le(F a, F b, F yes, F no) { return a.v <= b.v ? yes : no; }

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/compensated.inl"

// Where doubles go at half of float's speed, sums of products are in double instead, rounded once:
// as good, and in fewer instructions. A factor is then one double in the place of its two floats.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
constexpr bool kDoubles = true;
BATCHOPS_DEVICE void pack(float (&factor)[2], double value) {
  factor[0] = __int_as_float(__double2loint(value));
  factor[1] = __int_as_float(__double2hiint(value));
}
BATCHOPS_DEVICE void pack(float (&factor)[2]) {
  pack(factor, static_cast<double>(factor[0]) + static_cast<double>(factor[1]));
}
BATCHOPS_DEVICE double packed(const float (&factor)[2]) {
  return __hiloint2double(__float_as_int(factor[1]), __float_as_int(factor[0]));
}
#else
constexpr bool kDoubles = false;
BATCHOPS_DEVICE void pack(float (&)[2], double) {}
BATCHOPS_DEVICE void pack(float (&)[2]) {}
BATCHOPS_DEVICE double packed(const float (&factor)[2]) {
  return static_cast<double>(factor[0]) + static_cast<double>(factor[1]);
}
#endif
template <class... Factors>
BATCHOPS_DEVICE void pack_all(Factors&... factors) {
  (pack(factors), ...);
}
BATCHOPS_DEVICE F rounded(double x) { return F(static_cast<float>(x)); }
BATCHOPS_DEVICE F rounded(F x) { return x; }
BATCHOPS_DEVICE double wide(F x) { return static_cast<double>(x.v); }

// For all of this thread's copies.
BATCHOPS_DEVICE void wait_for_copies() {
#if defined(BATCHOPS_CUDA_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
  __pipeline_wait_prior(0);
#else
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
  keep_order();
}

// One copy of this thread's into shared memory.
template <int kBytes>
BATCHOPS_DEVICE void copy_ahead(float* to, const char* from, L2Policy policy) {
#if defined(BATCHOPS_CUDA_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
  static_cast<void>(policy);
  __pipeline_memcpy_async(to, from, kBytes);
#else
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 :
                 : "r"(place), "l"(__cvta_generic_to_global(from)), "l"(policy.bits)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;"
                 :
                 : "r"(place), "l"(__cvta_generic_to_global(from)), "n"(kBytes), "l"(policy.bits)
                 : "memory");
  }
#endif
}

// For addresses that the compiler would else keep in registers over all of the loops.
BATCHOPS_DEVICE int not_kept(int i) {
#ifndef BATCHOPS_CUDA_EMULATOR
  asm volatile("" : "+r"(i));
#endif
  return i;
}

// Room for two floats an element of a chunk. Each thread has places of its own, so that no barrier
// is needed, whatever tensor the room was for before:
//
//   [2][kInFlight][kThreads] units of kWidth floats
//
// An array on its way through has the first half or the second, and elements of two bytes leave the
// rest of their place empty.
struct Slot {
  float* floats;  // this thread's first ones; or null: there is no room

  Slot() = default;
  BATCHOPS_DEVICE explicit Slot(float* room)
      : floats(room + not_kept(static_cast<int>(threadIdx.x)) * kWidth) {}

  // Of what the second sweep does not read if there is.
  BATCHOPS_DEVICE L2Policy policy() const { return L2Policy(floats != nullptr); }

  // Elements n … n + W - 1 of those that are this thread's.
  template <int W>
  BATCHOPS_DEVICE void keep(int32_t n, const float (&a)[W], const float (&b)[W]) const {
    keep<0, W>(n, a);
    keep<1, W>(n, b);
  }
  template <int kHalf, int W>
  BATCHOPS_DEVICE void keep(int32_t n, const float (&a)[W]) const {
    if (floats != nullptr) keep_floats<W>(place(kHalf, n), a);
  }
  template <int W>
  BATCHOPS_DEVICE void fetch(int32_t n, float (&a)[W], float (&b)[W]) const {
    to_float<float, W>(load_unit<float, W>(place(0, n)), a);
    to_float<float, W>(load_unit<float, W>(place(1, n)), b);
  }

  // Starts the copies of this thread's units of an array.
  BATCHOPS_DEVICE void start(int half, const void* array, DType dtype, const Units& units,
                             L2Policy policy) const {
    const char* from = static_cast<const char*>(array) + units.thread * (kWidth * bytes_of(dtype));
    keep_order();
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (units.thread + u * kThreads >= units.count) break;
      if (bytes_of(dtype) == 4) {
        copy_ahead<16>(place(half, u * kWidth), from + u * (kThreads * kWidth * 4), policy);
      } else {
        copy_ahead<8>(place(half, u * kWidth), from + u * (kThreads * kWidth * 2), policy);
      }
    }
  }
  // What such a copy has brought.
  template <class T>
  BATCHOPS_DEVICE Unit<Held<T>, kWidth> copied(int half, DType dtype, int32_t n) const {
    const float* from = place(half, n);
    if constexpr (std::is_same_v<T, Any>) {
      float values[kWidth];
      with_element(dtype, [&](auto type) {
        using E = typename decltype(type)::type;
        to_float<E, kWidth>(load_unit<E, kWidth>(reinterpret_cast<const E*>(from)), values);
      });
      return load_unit<float, kWidth>(values);
    } else {
      return load_unit<T, kWidth>(reinterpret_cast<const T*>(from));
    }
  }

 private:
  BATCHOPS_DEVICE float* place(int half, int32_t n) const {
    const auto of_thread = static_cast<unsigned>(n);
    return floats + half * kChunk + of_thread / kWidth * (kThreads * kWidth) + of_thread % kWidth;
  }
};

// Of a chunk whose copies have come: where they are, and what to call as soon as the stage has been
// read. The slot is not copied to before the chunk is done with.
template <class Ahead>
struct Fetched {
  static constexpr bool kIs = true;
  Slot slot, stage;
  const Ahead& ahead;
};
// Of elements that are read from where they are.
struct NotFetched {
  static constexpr bool kIs = false;
};

// Calls use(staged(i, n), rest(i, n), i, n) for each unit of a first sweep; with kSlow in few
// registers.
template <bool kSlow, int W, class From, class Staged, class Rest, class Use>
BATCHOPS_DEVICE void for_each_first(const Units& units, const From& from, Staged&& staged,
                                    Rest&& rest, Use&& use) {
  if constexpr (!From::kIs) {
    struct Loaded {
      decltype(staged(0, 0)) early;
      decltype(rest(0, 0)) late;
    };
    for_each_unit<W == 1 ? kInFlight : 1>(
        units, [&](int32_t i) { return Loaded{staged(i, 0), rest(i, 0)}; },
        [&](const Loaded& raw, int32_t i, int32_t n) { use(raw.early, raw.late, i, n); });
  } else if constexpr (kSlow) {
#pragma unroll 1
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t i = units.thread + u * kThreads;
      if (i < units.count) use(staged(i, u * kWidth), rest(i, u * kWidth), i, u);
    }
    from.ahead();
  } else {
    decltype(staged(0, 0)) early[kInFlight] = {};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t i = units.thread + u * kThreads;
      if (i < units.count) early[u] = staged(i, u * kWidth);
    }
    from.ahead();
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t i = units.thread + u * kThreads;
      if (i < units.count) use(early[u], rest(i, u * kWidth), i, u);
    }
  }
}

// Of masters, P, that have changed: to the copy at low precision, if there is one.
template <class P, int W>
BATCHOPS_DEVICE void publish(const Part& x, int32_t begin, int32_t unit, const float (&from)[W]) {
  if (x.copy == nullptr) return;
  if constexpr (std::is_same_v<P, Any>) {
    Memory<Any>(x.copy, x.copy_dtype(), begin).store<W>(unit, from, Once{});
  } else if constexpr (std::is_same_v<P, float>) {
    with_element(x.copy_dtype(), [&](auto type) {
      Memory<typename decltype(type)::type>(x.copy, x.copy_dtype(), begin)
          .template store<W>(unit, from, Once{});
    });
  }
}

BATCHOPS_DEVICE bool skipped(const DeviceNumbers& device) {
  return device.found_inf != nullptr && *device.found_inf != 0;
}

// Algorithm gives
//   kSums                            doubles that are added up over a tensor
//   kStage                           arrays that the stage has places for
//   Group, Set                       hyperparameters; Set(group, step, excluded)
//   with_rates(group, rates)         the group with those of its numbers that are on the device
//   Factors(Set, C)                  what sweeps make of them; C is what gradients are divided by
//   sums(factors)                    how many of the first kSums are not 0 in any case
//   Outcome                          what the second sweep needs of a tensor
//   outcome(Set, sums, numel, C, grad_scale, stats)
//   kGradAgain                       whether the second sweep reads g where nothing was kept
//   fetch(part, units, slot, stage)            starts the copies that first() finds there
//   fetch_second(part, units, stage)           … and those that second() does, if any
//   typed(factors)                             whether first<P, G> with types will do
//   typed_second(outcome)                      … and whether second<…> will
//   first<P, G, W>(part, units, factors, from, kept, sums)        adds to sums; see with_units
//   second<kKept, P, G, W>(part, units, factors, outcome, kept, stage)
template <class Algorithm>
struct StepArguments {
  using Set = typename Algorithm::Set;
  using Outcome = typename Algorithm::Outcome;

  Table table;
  int32_t slots;  // of a block, two or more
  // The workspace. Counters are 0 at first.
  unsigned* arrived;         // blocks that have added up their gradients' squares
  unsigned* arrivals;        // [tensors], groups that have their sums
  unsigned* group_arrivals;  // chunks that have
  unsigned* ready;           // [tensors], 1 with the outcome
  GradSquares squares;
  double* sums;        // [chunks, kSums]
  double* group_sums;  // [groups, kSums]
  Outcome* outcomes;   // [tensors]
  // Where they are too many for arguments; or, with `by_tensor`, made of step counts on the device.
  const Set* more_sets;
  bool by_tensor;
  // The clip: none with max_grad_norm 0; over more tensors than these with grad_sum_sq.
  const double* grad_sum_sq;
  double max_grad_norm, clip_eps, grad_scale;
  DeviceNumbers device;
  TensorStats* stats;  // or null
  Set sets[kMaxSets];

  BATCHOPS_DEVICE int32_t set_of(int32_t tensor, const Entry& x) const {
    return by_tensor ? tensor : x.set;
  }
  BATCHOPS_DEVICE const Set& set(int32_t index) const {
    return more_sets == nullptr ? sets[index] : more_sets[index];
  }
  BATCHOPS_DEVICE double scale() const {
    return device.grad_scale == nullptr ? grad_scale : *device.grad_scale;
  }
};

// Brings this warp to a barrier of the block without waiting there.
template <int kBarrier, int kCount>
BATCHOPS_DEVICE void barrier_arrive() {
#ifdef BATCHOPS_CUDA_EMULATOR
  __barrier_arrive_count(kBarrier, kCount);
#else
  asm volatile("barrier.arrive %0, %1;" ::"n"(kBarrier), "n"(kCount) : "memory");
#endif
}

template <class Algorithm>
class Step {
  static constexpr int kSums = Algorithm::kSums;
  using Factors = typename Algorithm::Factors;
  using Outcome = typename Algorithm::Outcome;

 public:
  // `memory`: the dynamic shared memory.
  BATCHOPS_DEVICE Step(const StepArguments<Algorithm>& args, float* memory)
      : args_(args), memory_(memory) {
    const int unused = 32 - 4 * args.slots;
    order_ = 0x76543210u << unused >> unused;
  }

  BATCHOPS_DEVICE void run() {
    if (skipped(args_.device)) return forget_stats();
    int32_t item = static_cast<int32_t>(blockIdx.x);
    Lookout lookout;
    if (warp() == kScout) lookout = look_out();
    __syncthreads();
    if (warp() < kWarps && is_chunk(item)) fetch(item, 0);
    find_divisor();
    if (warp() == kClerk) return keep_books();
    if (warp() == kScout) return look_ahead(lookout);
    meet();
    for (int32_t turn = 0;; item += blocks(), ++turn) {
      const bool over = !is_chunk(item), kept = over || is_kept(turn);
      if (over) {
        meet();
        sweep_small_ones(item, turn);
      }
      const bool follows = turn > 0, after_kept = follows && is_kept(turn - 1);
      // Chunks that were not kept, between those that are and this item.
      const int32_t gap = follows && !after_kept && deferred_ > 0 ? deferred_ : 0;
      // Kept ones that nothing is known of once others come between.
      const bool all = over || (gap > 0 && kept) || (!kept && after_kept && deferred_ != 0);
      const bool wait = deferred_ >= (all ? 0 : most_deferred());
      settle(item, turn, gap, all || (wait && gap > 0) ? 0 : room() - 1);
      if (wait) sweep_again();
      if (over) break;
      if (deferred_ >= 0) ++deferred_;
      sweep(item, turn, kept);
      defer(item, turn);
      meet();
    }
  }

 private:
  static BATCHOPS_DEVICE int32_t blocks() { return static_cast<int32_t>(gridDim.x); }
  static BATCHOPS_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static BATCHOPS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  // The sweeping warps and the scout, each at its own place in the code.
  static BATCHOPS_DEVICE void meet() {
    __syncwarp();
    __barrier_sync_count(1, kThreads + kWarp);
  }
  // Between the sweeping warps and the clerk, who goes on at once when it gives the sums' places
  // back, as they do when they have written them: each side waits for the other's last word only.
  static constexpr int kFree = 2, kFull = 3;
  template <int kBarrier>
  static BATCHOPS_DEVICE void say() {
    __syncwarp();
    barrier_arrive<kBarrier, kThreads + kWarp>();
  }
  template <int kBarrier>
  static BATCHOPS_DEVICE void wait_to_be() {
    __syncwarp();
    __barrier_sync_count(kBarrier, kThreads + kWarp);
  }

  // What gradients are divided by.
  static BATCHOPS_DEVICE double divisor() { return shared().divisor; }
  BATCHOPS_DEVICE void find_divisor() const {
    double by = args_.scale();
    if (args_.max_grad_norm > 0) {
      double sum_sq;
      if (args_.grad_sum_sq != nullptr) {
        sum_sq = *args_.grad_sum_sq;
      } else {
        static_assert(kSums * kWarps >= kBlock / kWarp);
        double* by_warp = &shared().sums[0][0];  // which are not needed yet
        args_.squares.template add_up<kBlock>(args_.table, by_warp);
        if (threadIdx.x == 0) {
          add_one(args_.arrived);
          wait_for(args_.arrived, gridDim.x);
        }
        __syncthreads();
        sum_sq = args_.squares.template total<kBlock>(by_warp);
      }
      by = grad_divisor(sum_sq, args_.max_grad_norm, args_.clip_eps, args_.scale());
    }
    if (threadIdx.x == 0) shared().divisor = by;
    __syncthreads();
  }

  // Chunks that are swept before what waits for a tensor's outcome is looked at again, where slots
  // do not run out before: by then it is there, and the L2 cache has not forgotten yet.
  static constexpr int kDeferred = 2;
  static_assert(kDeferred > 0, "or what is kept would be lost track of, unless it is settled");

  // No more than the least that a block has of a tensor that it does not keep whole.
  BATCHOPS_DEVICE int32_t most_deferred() const {
    return room() > kDeferred ? kDeferred : room() - 1;
  }

  // By the sweeping warps, all of them, once a tensor.
  BATCHOPS_DEVICE void wait_for_outcome(int32_t tensor) {
    if (tensor == settled_) return;
    settled_ = tensor;
    if (threadIdx.x == 0) wait_for(&args_.ready[tensor], 1);
    __syncwarp();
    __barrier_sync_count(4, kThreads);
  }

  // Turns before a chunk's second sweep in which its entry is there: copies for it start one
  // before.
  static constexpr int kSettleAhead = Algorithm::kFetchesSecond ? 2 : 1;
  // Places for those, of turns that follow each other: a power of two.
  static constexpr int kSettled = 2 * kSettleAhead;
  static BATCHOPS_DEVICE unsigned at(int32_t turn, unsigned places) {
    return static_cast<unsigned>(turn) % places;
  }

  // Where a chunk is.
  struct Place {
    int32_t tensor, set;
    int32_t first_chunk, last_chunk, rank;  // of the tensor
    int32_t room;                           // how many of its chunks the blocks keep, the last ones
  };

  // What the warps of a block hand each other, by turns.
  struct Shared {
    double sums[kSums][kWarps];  // for the clerk
    double divisor;
    // By the scout: those of this turn and of the next. And, of the chunks to sweep again, theirs
    // and which is the last.
    unsigned char factors[3 * sizeof(Factors)];
    int32_t left_out;
    // By the scout, as all below: of the chunks of this turn, of the one before and of the next
    // two.
    Part parts[4];
    Place places[4];
    // Of the chunk that makes room in a turn, as long as all are kept.
    Part settled[kSettled];
    Outcome outcomes[2];
    int32_t outcome_chunks[2];  // whose outcomes they are; or below 0
  };
  static_assert(sizeof(Shared) <= kStaticBytes, "or slots_of counts too many");
  static BATCHOPS_DEVICE Shared& shared() {
    BATCHOPS_SHARED(shared, Shared);
    return shared;
  }
  static BATCHOPS_DEVICE Factors& factors_at(int32_t turn) {
    return reinterpret_cast<Factors*>(shared().factors)[at(turn, 2)];
  }
  static BATCHOPS_DEVICE Factors& factors_again() {
    return reinterpret_cast<Factors*>(shared().factors)[2];
  }

  static BATCHOPS_DEVICE Part& part_at(int32_t turn) {
    return shared().parts[at(not_kept(turn), 4)];
  }
  static BATCHOPS_DEVICE Place& place_at(int32_t turn) {
    return shared().places[at(not_kept(turn), 4)];
  }
  // Whether slots hold the block's chunks of a turn's tensor from this one's on.
  static BATCHOPS_DEVICE bool is_kept(int32_t turn) { return part_at(turn).kept != 0; }
  static BATCHOPS_DEVICE Part& settled_at(int32_t turn) {
    return shared().settled[at(turn, kSettled)];
  }

  BATCHOPS_DEVICE bool is_chunk(int32_t item) const { return item < args_.table.chunks; }
  BATCHOPS_DEVICE const Entry& entry(int32_t tensor) const { return args_.table.entries[tensor]; }
  BATCHOPS_DEVICE int32_t tensor_of(int32_t chunk) const { return args_.table.tensor_of[chunk]; }

  // Chunks of one tensor that a block keeps: one slot is for the copies of the next. Of a tensor
  // that is not kept whole, one less: then the next tensor's are swept before it is settled.
  BATCHOPS_DEVICE int32_t room() const { return args_.slots - 1; }
  BATCHOPS_DEVICE int32_t room_for(const Entry& x) const {
    return x.chunks() > room() * blocks() ? room() - 1 : room();
  }
  // The slot so many places before the next free one.
  BATCHOPS_DEVICE Slot slot(int32_t before) const {
    const int place = 4 * (before == 0 ? 0 : args_.slots - before);
    const int index = static_cast<int>(order_ >> place & 15);
    return Slot(memory_ + (index * 2 + Algorithm::kStage) * kChunk);
  }
  BATCHOPS_DEVICE Slot stage() const { return Slot(memory_); }
  // Those that are kept follow each other. One that is not changes places with the one after it,
  // where the copies of the next chunk go.
  BATCHOPS_DEVICE Slot take_slot(bool keeps) {
    const Slot taken = slot(0);
    const uint32_t first = order_ & 15;
    if (keeps) {
      ++kept_;
      order_ = order_ >> 4 | first << 4 * (args_.slots - 1);
    } else {
      order_ = (order_ & ~255u) | (order_ >> 4 & 15) | first << 4;
    }
    return taken;
  }

  // Starts the copies for a chunk, into the next free slot; and those for the second sweep over the
  // chunk that is kept longest, if that makes room in the next turn.
  BATCHOPS_DEVICE void fetch(int32_t chunk, int32_t turn) {
    const Part& x = part_at(turn);
    if (x.units > 0) Algorithm::fetch(x, Units::wide(x, kThreads), slot(0), stage());
    fetched_second_ = -1;
    if (Algorithm::kFetchesSecond && kept_ == args_.slots - 1) {
      const int32_t oldest = chunk - kept_ * blocks();
      const Part& y = settled_at(turn);
      if (y.units > 0) Algorithm::fetch_second(y, Units::wide(y, kThreads), stage());
      fetched_second_ = oldest;
    }
    __pipeline_commit();
  }

  BATCHOPS_DEVICE void sweep(int32_t item, int32_t turn, bool kept) {
    const Slot taken = take_slot(kept), keeper = kept ? taken : Slot{};
    const Part& x = part_at(turn);
    const Factors& factors = factors_at(turn);
    const int32_t next = item + blocks();
    const auto ahead = [&] {
      if (is_chunk(next)) fetch(next, turn + 1);
    };
    double sums[kSums] = {};
    wait_for_copies();
    if (x.units > 0) {
      const Units wide = Units::wide(x, kThreads);
      const Fetched<decltype(ahead)> from{taken, stage(), ahead};
      if (Algorithm::typed(factors)) {
        with_element(x.p_dtype(), [&](auto p) {
          with_element(x.g_dtype(), [&](auto g) {
            Algorithm::template first<typename decltype(p)::type, typename decltype(g)::type,
                                      kWidth>(x, wide, factors, from, keeper, sums);
          });
        });
      } else {
        Algorithm::template first<Any, Any, kWidth>(x, wide, factors, from, keeper, sums);
      }
    } else {
      ahead();
    }
    if (x.rest > 0) {
      Algorithm::template first<Any, Any, 1>(x, Units::narrow(x, kThreads), factors, NotFetched{},
                                             keeper, sums);
    }
    const int used = Algorithm::sums(factors);
    constexpr int kTogether = 4;
    double some[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kSums && i < kTogether; ++i) some[i] = sums[i];
    const double sum = warp_sums(some);
#pragma unroll
    for (int i = kTogether; i < kSums; ++i) {
      if (i < used) sums[i] = warp_sum(sums[i]);
    }
    wait_to_be<kFree>();
    if (const int i = sum_of_lane(not_kept(lane())); i >= 0 && i < kSums) {
      shared().sums[i][not_kept(warp())] = sum;
    }
    if (kSums > kTogether && lane() == 0) {
#pragma unroll
      for (int i = kTogether; i < kSums; ++i) shared().sums[i][not_kept(warp())] = sums[i];
    }
    say<kFull>();
  }

  // This warp's small tensors of the items from `item` on, each from its sums to its update.
  // Copies for chunks are over, so the stage is free, and a slot.
  struct SmallShared {
    Factors factors;
    int32_t set;  // of the factors
    // What the loop over chunks has to know again after this: registers run short here.
    int32_t item, turn, kept, deferred, settled;
    uint32_t order;
  };
  BATCHOPS_DEVICE void sweep_small_ones(int32_t& at_item, int32_t& turn) {
    const Table& table = args_.table;
    SmallShared& of_warp = reinterpret_cast<SmallShared*>(memory_)[warp()];
    const Slot kept = slot(0);
    int32_t item = at_item;
    if (lane() == 0) {
      of_warp.set = -1;
      of_warp.item = item;
      of_warp.turn = turn;
      of_warp.kept = kept_;
      of_warp.deferred = deferred_;
      of_warp.settled = settled_;
      of_warp.order = order_;
    }
    sweep_small_ones(item, kept, of_warp);
    __syncwarp();
    at_item = of_warp.item;
    turn = of_warp.turn;
    kept_ = of_warp.kept;
    deferred_ = of_warp.deferred;
    settled_ = of_warp.settled;
    order_ = of_warp.order;
  }
  BATCHOPS_DEVICE void sweep_small_ones(int32_t item, Slot kept, SmallShared& of_set) const {
    const Table& table = args_.table;
    for (; item < table.items(); item += blocks()) {
      const int32_t index = (item - table.chunks) * kWarps + warp();
      if (index >= table.smalls) return;
      const int32_t tensor = table.tensor_of[table.chunks + index];
      const Entry& x = entry(tensor);
      __syncwarp();
      if (lane() == 0) {
        const int32_t set = args_.set_of(tensor, x);
        if (set != of_set.set) of_set.factors = Factors(args_.set(set), divisor());
        of_set.set = set;
      }
      __syncwarp();
      const Factors& factors = of_set.factors;
      const Part part = Part::whole(x);
      double sums[kSums] = {};
      if (part.units > 0) {
        Algorithm::template first<Any, Any, kWidth>(part, Units::wide(part, kWarp), factors,
                                                    NotFetched{}, kept, sums);
      }
      if (part.rest > 0) {
        Algorithm::template first<Any, Any, 1>(part, Units::narrow(part, kWarp), factors,
                                               NotFetched{}, kept, sums);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
      if (lane() == 0) find_outcome<false>(tensor, args_.set_of(tensor, x), x.numel, sums);
      __syncwarp();
      second<true, kWarp>(Part::whole(entry(not_kept(tensor))), factors,
                          Outcome(args_.outcomes[tensor]), kept, Slot{});
    }
  }

  // Second sweeps over the chunks that are kept longest, of those before the last `gap` before
  // `item`, until at most `most` are kept.
  BATCHOPS_DEVICE void settle(int32_t item, int32_t turn, int32_t gap, int32_t most) {
    for (; kept_ > most; --kept_) {
      const int32_t oldest = item - (kept_ + gap) * blocks();
      Part x;
      Outcome outcome;
      if (shared().outcome_chunks[at(turn, 2)] == oldest) {
        x = settled_at(turn);
        outcome = shared().outcomes[at(turn, 2)];
      } else {
        const int32_t tensor = tensor_of(oldest);
        wait_for_outcome(tensor);
        x = Part::of_chunks(entry(tensor), oldest);
        outcome = args_.outcomes[tensor];
      }
      const bool fetched = Algorithm::kFetchesSecond && oldest == fetched_second_;
      if (fetched) wait_for_copies();
      second<true, kThreads>(x, factors_at(turn), outcome, slot(kept_), fetched ? stage() : Slot{});
    }
  }

  // Where the part was kept, the factors may be those of another tensor. Small tensors are not
  // worth code for each type.
  template <bool kKept, int kBy>
  BATCHOPS_DEVICE void second(const Part& x, const Factors& factors, const Outcome& outcome,
                              const Slot& slot, const Slot& stage) const {
    constexpr bool kGrad = Algorithm::kGradAgain && !kKept;
    with_units<kBy, kGrad>(
        x, kBy == kThreads && Algorithm::typed_second(outcome),
        [&](auto p, auto g, auto width, const Units& units) {
          Algorithm::template second<kKept, typename decltype(p)::type, typename decltype(g)::type,
                                     decltype(width)::value>(x, units, factors, outcome, slot,
                                                             stage);
        });
  }

  // After the block's last chunk of a tensor: leaves to a later turn what waits for its outcome.
  // That is the chunks that were not kept, if any, and those that were, if the next tensor's are
  // not.
  BATCHOPS_DEVICE void defer(int32_t item, int32_t turn) {
    const Place& x = place_at(turn);
    const int32_t next = item + blocks(), left_out = item - x.room;
    if (next <= x.last_chunk) return;
    const bool some = left_out >= x.first_chunk;
    if (!some && (deferred_ >= 0 || !is_chunk(next) || is_kept(turn + 1))) return;
    // All have met in the sweep since they had those of others in use, and will meet the scout.
    if (threadIdx.x == 0) {
      shared().left_out = some ? left_out : -1;
      if (some) factors_again() = factors_at(turn);
    }
    deferred_ = 0;
  }
  // The chunks that were not kept, back to front, for what was read last is still in the L2 cache.
  BATCHOPS_DEVICE void sweep_again() {
    deferred_ = -1;
    const int32_t last = shared().left_out;
    if (last < 0) return;
    const int32_t tensor = tensor_of(last);
    wait_for_outcome(tensor);
    const Entry& x = entry(tensor);
    const Outcome outcome = args_.outcomes[tensor];
    for (int32_t item = last; item >= x.first_chunk; item -= blocks()) {
      second<false, kThreads>(Part::of_chunks(x, item), factors_again(), outcome, Slot{}, Slot{});
    }
  }

  // ---- the scout

  // What it has asked memory for in a turn and looks at in the next.
  struct Lookout {
    int32_t tensors;   // lane turn % kWarp: of that turn's chunk
    uint32_t next;     // a word of the entry that comes next; see word_of
    uint32_t settled;  // a word of the entry of tensor …
    int32_t settled_tensor;
  };
  static constexpr int kWords = sizeof(Entry) / sizeof(uint32_t);
  BATCHOPS_DEVICE static int32_t chunk_at(int32_t turn) {
    return static_cast<int32_t>(blockIdx.x) + turn * blocks();
  }
  BATCHOPS_DEVICE static int32_t tensor_at(const Lookout& now, int32_t turn) {
    return __shfl_sync(kAllLanes, now.tensors, turn % kWarp);
  }
  // This lane's word of a tensor's entry.
  BATCHOPS_DEVICE uint32_t word_of(int32_t tensor) const {
    return lane() < kWords ? reinterpret_cast<const uint32_t*>(&entry(tensor))[lane()] : 0;
  }
  // The entry whose words the lanes have.
  BATCHOPS_DEVICE static Entry entry_of(uint32_t word) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(kAllLanes, word, i);
    Entry x;
    memcpy(&x, words, sizeof(x));
    return x;
  }

  // Before the first turn: the parts of the first two, and what the first turn looks at.
  BATCHOPS_DEVICE Lookout look_out() const {
    Lookout now{0, 0, 0, -1};
    if (lane() < 4 && is_chunk(chunk_at(lane()))) now.tensors = tensor_of(chunk_at(lane()));
    uint32_t words[3] = {};
#pragma unroll
    for (int turn = 0; turn < 3; ++turn) {
      const int32_t tensor = tensor_at(now, turn);
      if (is_chunk(chunk_at(turn))) words[turn] = word_of(tensor);
    }
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) describe(now, words[turn], turn);
    now.next = words[2];
    if (kSettleAhead > 1) describe_settled(now, 1);
    return now;
  }

  // A turn's chunk.
  BATCHOPS_DEVICE void describe(const Lookout& now, uint32_t word, int32_t turn) const {
    const int32_t chunk = chunk_at(turn), tensor = tensor_at(now, turn);
    if (!is_chunk(chunk)) return;
    const Entry x = entry_of(word);
    if (lane() != 0) return;
    const int32_t room = room_for(x) * blocks();
    Part part = Part::of_chunks(x, chunk);
    part.kept = x.last_chunk() - chunk < room;
    part_at(turn) = part;
    place_at(turn) = {tensor, args_.set_of(tensor, x), x.first_chunk, x.last_chunk(), x.rank, room};
  }
  // The chunk that makes room in the turn.
  BATCHOPS_DEVICE void describe_settled(Lookout& now, int32_t turn) const {
    const int32_t oldest = chunk_at(turn - room());
    const int32_t tensor = tensor_at(now, turn - room() + kWarp);
    if (turn < room() || !is_chunk(oldest)) return;
    if (tensor != now.settled_tensor) now.settled = word_of(tensor);
    now.settled_tensor = tensor;
    const Entry x = entry_of(now.settled);
    if (lane() == 0) settled_at(turn) = Part::of_chunks(x, oldest);
  }

  BATCHOPS_DEVICE void look_ahead(Lookout now) const {
    if (is_chunk(chunk_at(0)) && lane() == 0) {
      factors_at(0) = Factors(args_.set(place_at(0).set), divisor());
    }
    if (lane() == 0) shared().outcome_chunks[0] = -1;
    meet();
    for (int32_t turn = 0; is_chunk(chunk_at(turn)); ++turn) {
      describe(now, now.next, turn + 2);
      if (is_chunk(chunk_at(turn + 3))) now.next = word_of(tensor_at(now, turn + 3));
      if (lane() == (turn + 4) % kWarp && is_chunk(chunk_at(turn + 4))) {
        now.tensors = tensor_of(chunk_at(turn + 4));
      }
      prepare(now, turn + 1);
      meet();
    }
    meet();
  }

  // What the sweeping warps need in that turn, which is the next, beside its entry.
  BATCHOPS_DEVICE void prepare(Lookout& now, int32_t turn) const {
    describe_settled(now, turn + kSettleAhead - 1);
    if (is_chunk(chunk_at(turn)) && lane() == 0) {
      const int32_t set = place_at(turn).set;
      if (place_at(turn - 1).set == set) {
        factors_at(turn) = factors_at(turn - 1);
      } else {
        factors_at(turn) = Factors(args_.set(set), divisor());
      }
    }
    // As long as chunks are kept, this is the one that makes room for another.
    const int32_t oldest = chunk_at(turn - room());
    const int32_t tensor = tensor_at(now, turn - room() + kWarp);
    const int32_t tensor_before = tensor_at(now, turn - 1 - room() + kWarp);
    // Not before the sweep over this block's last chunk of it, which may be in the turn before.
    const bool early = turn >= room() && is_chunk(chunk_at(turn)) &&
                       tensor != tensor_at(now, turn - 1) && is_kept(turn - 1);
    if (lane() == 0) {
      const int32_t before = shared().outcome_chunks[at(turn - 1, 2)];
      shared().outcome_chunks[at(turn, 2)] = early ? oldest : -1;
      if (early) {
        if (before >= 0 && tensor_before == tensor) {
          shared().outcomes[at(turn, 2)] = shared().outcomes[at(turn - 1, 2)];
        } else {
          wait_for(&args_.ready[tensor], 1);
          shared().outcomes[at(turn, 2)] = args_.outcomes[tensor];
        }
      }
    }
    __syncwarp();
  }

  // ---- the clerk

  BATCHOPS_DEVICE void keep_books() const {
    int32_t item = static_cast<int32_t>(blockIdx.x);
    if (is_chunk(item)) say<kFree>();
    for (int32_t turn = 0; is_chunk(item); item += blocks(), ++turn) {
      wait_to_be<kFull>();
      const Place place = place_at(turn);
      double sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i] = lane() < kWarps ? shared().sums[i][lane()] : 0.0;
        sums[i] = sum_of_lanes(sums[i], kWarps);
      }
      // Each sum has been shuffled to all lanes, so that all have read theirs.
      if (is_chunk(item + blocks())) say<kFree>();
      arrive(item, place, sums);
    }
  }

  // Sums come together by groups of chunks, and these by tensors.
  // The first of a tensor's groups; more than any of an earlier tensor.
  static BATCHOPS_DEVICE int32_t first_group(const Place& x) {
    return x.first_chunk / kGroup + x.rank;
  }

  BATCHOPS_DEVICE static void load_sums(const double* from, double (&sums)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += from[i];
  }

  // Brings the sums of a chunk.
  BATCHOPS_DEVICE void arrive(int32_t item, const Place& x, double (&sums)[kSums]) const {
    const int64_t numel = entry(x.tensor).numel;  // asked for before it is needed
    const int32_t chunks = x.last_chunk + 1 - x.first_chunk;
    const int32_t groups = (chunks + kGroup - 1) / kGroup;
    const int32_t chunk = item - x.first_chunk, group = chunk / kGroup;
    const int32_t in_group = group + 1 < groups ? kGroup : chunks - group * kGroup;
    const int32_t place = first_group(x);
    if (!is_last(&args_.group_arrivals[place + group], in_group, sums,
                 args_.sums + int64_t{item} * kSums)) {
      return;
    }
    const auto add_up = [&](const double* from, int32_t count) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0;
#pragma unroll 4
      for (int32_t k = lane(); k < count; k += kWarp) load_sums(from + int64_t{k} * kSums, sums);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
    };
    add_up(args_.sums + (int64_t{x.first_chunk} + group * kGroup) * kSums, in_group);
    if (groups > 1) {
      if (!is_last(&args_.arrivals[x.tensor], groups, sums,
                   args_.group_sums + int64_t{place + group} * kSums)) {
        return;
      }
      add_up(args_.group_sums + int64_t{place} * kSums, groups);
    }
    if (lane() == 0) find_outcome<true>(x.tensor, x.set, numel, sums);
  }

  // Stores the sums and says whether they are the last of `count`: then all are there to see.
  static BATCHOPS_DEVICE bool is_last(unsigned* counter, int32_t count, const double (&sums)[kSums],
                                      double* to) {
    unsigned before = 0;
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) to[i] = sums[i];
      before = add_one(counter);
      if (before + 1 == static_cast<unsigned>(count)) acquired(counter);
    }
    before = __shfl_sync(kAllLanes, before, 0);
    __syncwarp();  // what lane 0 has seen
    return before + 1 == static_cast<unsigned>(count);
  }

  // Statistics are nobody's haste, so they come after what others wait for.
  template <bool kPublish>
  BATCHOPS_DEVICE void find_outcome(int32_t tensor, int32_t set, int64_t numel,
                                    const double (&sums)[kSums]) const {
    const auto find = [&](TensorStats& stats) {
      return Algorithm::outcome(args_.set(set), sums, numel, divisor(), args_.scale(), stats);
    };
    TensorStats stats;
    args_.outcomes[tensor] = find(stats);
    if (kPublish) set_one(&args_.ready[tensor]);
    if (args_.stats == nullptr) return;
    find(stats);
    args_.stats[tensor] = stats;
  }

  // Of a step that is skipped.
  BATCHOPS_DEVICE void forget_stats() const {
    if (args_.stats == nullptr) return;
    constexpr float nothing = std::numeric_limits<float>::quiet_NaN();
    for (int32_t i = static_cast<int32_t>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x);
         i < args_.table.tensors; i += blocks() * kBlock) {
      args_.stats[i] = {nothing, nothing, nothing, nothing};
    }
  }

  const StepArguments<Algorithm>& args_;
  float* memory_;
  int32_t kept_ = 0;             // in a row, though others may follow
  uint32_t order_;               // the slots from the next free one on, four bits each
  int32_t deferred_ = -1;        // items since one was left to wait (defer()); or below 0
  int32_t settled_ = -1;         // a tensor whose outcome is known to be there
  int32_t fetched_second_ = -1;  // a chunk whose second sweep finds copies in the stage
};

// ---- host

// Places in the workspace, one after the other.
class Cutter {
 public:
  explicit Cutter(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(size_t count) {
    T* place = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * sizeof(T) + 15) / 16 * 16;
    return place;
  }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  size_t bytes_ = 0;
};

template <class Set>
struct SetsToStore {
  Set* to;
  int32_t count;
  Set sets[kMaxSets];
};
// Sets of step counts on the device, each tensor its own.
template <class Algorithm>
struct SetsToMake {
  // Of tensors whose Entry::set is this one's index.
  struct Seed {
    typename Algorithm::Group group;
    int32_t excluded;
  };
  Table table;
  typename Algorithm::Set* to;  // [tensors]
  DeviceNumbers device;
  int32_t first, count;
  Seed seeds[kMaxSets];
};
template <class Algorithm>
BATCHOPS_DEVICE void make_sets(const SetsToMake<Algorithm>& args) {
  const int32_t i = static_cast<int32_t>(blockIdx.x) * kMaxSets + static_cast<int>(threadIdx.x);
  if (i >= args.table.tensors || skipped(args.device)) return;
  const Row& x = args.table.entries[i];
  const int32_t k = x.set - args.first;
  if (k < 0 || k >= args.count) return;
  const auto& seed = args.seeds[k];
  *x.step += 1;
  args.to[i] =
      typename Algorithm::Set(seed.group.device_rates == nullptr
                                  ? seed.group
                                  : Algorithm::with_rates(seed.group, seed.group.device_rates),
                              *x.step, seed.excluded != 0);
}

template <class Set>
BATCHOPS_DEVICE void store_sets(const SetsToStore<Set>& args) {
  const auto i = static_cast<int32_t>(threadIdx.x);
  if (i < args.count) args.to[i] = args.sets[i];
}

// A step's arguments, and the workspace behind them.
template <class Algorithm>
struct StepPlan {
  using Set = typename Algorithm::Set;

  StepArguments<Algorithm> args{};
  std::vector<Set> sets;
  std::vector<typename SetsToMake<Algorithm>::Seed> seeds;  // in place of sets
  Set* stored_sets = nullptr;                               // where they are not arguments
  size_t counter_bytes = 0, bytes = 0;
  int32_t sm_margin;

  template <class Args>
  StepPlan(const Args& given, const void* table, void* workspace) : sm_margin(given.sm_margin) {
    const auto make = [&](auto& made, auto&& one) {
      optimizer_sets(given.tensors, given.tensor_count, given.group_count, made, one);
    };
    size_t stored = 0;
    if (given.tensor_count > 0 && given.tensors[0].device_step != nullptr) {
      make(seeds, [&](const OptimizerTensor& x) {
        return typename SetsToMake<Algorithm>::Seed{given.groups[x.group], x.excluded};
      });
      stored = given.tensor_count;
    } else {
      make(sets, [&](const OptimizerTensor& x) {
        return Set(given.groups[x.group], x.step, x.excluded != 0);
      });
      if (sets.size() > kMaxSets) stored = sets.size();
    }
    args.table = Table(given.tensors, given.tensor_count, table);
    args.squares = GradSquares(args.table);
    Cutter cutter(workspace);
    args.arrived = cutter.take<unsigned>(1);
    args.arrivals = cutter.take<unsigned>(args.table.tensors);
    const size_t groups = args.table.chunks / kGroup + args.table.tensors + 1;
    args.group_arrivals = cutter.take<unsigned>(groups);
    args.ready = cutter.take<unsigned>(args.table.tensors);
    counter_bytes = cutter.bytes();
    args.squares.sums = cutter.take<double>(args.squares.pieces);
    args.sums = cutter.take<double>(size_t{Algorithm::kSums} * args.table.chunks);
    args.group_sums = cutter.take<double>(Algorithm::kSums * groups);
    args.outcomes = cutter.take<typename Algorithm::Outcome>(args.table.tensors);
    stored_sets = cutter.take<Set>(stored);
    bytes = cutter.bytes();
    args.max_grad_norm = given.max_grad_norm;
    args.grad_scale = given.grad_scale;
    args.device = given.device;
  }
};

// The kernels of an optimizer: __global__ functions that call Step::run and store_sets.
template <class Algorithm>
struct StepKernels {
  const char* name;
  void (*step)(const StepArguments<Algorithm>);
  const char* store_name;
  void (*store_sets)(const SetsToStore<typename Algorithm::Set>);
  const char* make_name;
  void (*make_sets)(const SetsToMake<Algorithm>);
};

// Slots that a block has beside its stage: where kResident of them share a multiprocessor or, if
// that leaves less than it takes to have a chunk's outcome come while another one is swept, where
// it has one for itself.
inline int32_t slots_of(const Device& device, int stage_bytes) {
  constexpr int kReserved = 1024;  // by the driver, of each block
  constexpr int kWorth = 3, kLeast = 2, kMost = 8;
  static_assert(kMost * 4 <= 32 && kMost <= kWarp / 2, "for Step::order_ and the scout's lanes");
  const auto slots = [&](int blocks) {
    const int share = device.shared_of_all / blocks - kReserved;
    return (std::min(share, device.shared) - kStaticBytes - stage_bytes) / kSlotBytes;
  };
  const int shared = slots(kResident);
  return std::clamp(shared >= kWorth ? shared : slots(1), kLeast, kMost);
}

// Puts the sets where the step will find them.
template <class Algorithm>
const char* place_sets(const StepKernels<Algorithm>& kernels, StepPlan<Algorithm>& plan,
                       void* stream) {
  // Calls send(first, count, batch) with as many of `all` as a launch takes.
  const auto in_batches = [](const auto& all, auto* batch, auto&& send) -> const char* {
    const auto size = static_cast<int32_t>(all.size());
    for (int32_t first = 0; first < size; first += kMaxSets) {
      const int32_t count = std::min(kMaxSets, size - first);
      std::copy_n(all.begin() + first, count, batch);
      if (const char* error = send(first, count)) return error;
    }
    return nullptr;
  };
  StepArguments<Algorithm>& args = plan.args;
  if (!plan.seeds.empty()) {
    args.more_sets = plan.stored_sets;
    args.by_tensor = true;
    SetsToMake<Algorithm> some{args.table, plan.stored_sets, args.device, 0, 0, {}};
    return in_batches(plan.seeds, some.seeds, [&](int32_t first, int32_t count) {
      some.first = first;
      some.count = count;
      return launch(kernels.make_name, kernels.make_sets,
                    (args.table.tensors + kMaxSets - 1) / kMaxSets, kMaxSets, 0, stream, some);
    });
  }
  if (plan.sets.size() <= kMaxSets) {
    std::copy(plan.sets.begin(), plan.sets.end(), args.sets);
    return nullptr;
  }
  args.more_sets = plan.stored_sets;
  SetsToStore<typename Algorithm::Set> some{};
  return in_batches(plan.sets, some.sets, [&](int32_t first, int32_t count) {
    some.to = plan.stored_sets + first;
    some.count = count;
    return launch(kernels.store_name, kernels.store_sets, 1, kMaxSets, 0, stream, some);
  });
}

template <class Algorithm>
const char* launch_step(const StepKernels<Algorithm>& kernels, StepPlan<Algorithm>& plan,
                        int device, void* stream) {
  StepArguments<Algorithm>& args = plan.args;
  const int32_t items = args.table.items();
  if (items == 0) return nullptr;
  if (const char* error = place_sets(kernels, plan, stream)) return error;
  Device found;
  if (const char* error = query(kernels.name, device, found)) return error;
  constexpr int kStageBytes = Algorithm::kStage * kChunk * static_cast<int>(sizeof(float));
  args.slots = slots_of(found, kStageBytes);
  LaunchShape shape{dim3(1, 1, 1), dim3(kBlock, 1, 1),
                    static_cast<size_t>(args.slots) * kSlotBytes + kStageBytes};
  shape.cooperative = true;
  int64_t blocks = 0;
  if (const char* error = resident_blocks(kernels.name, kernels.step, shape, device, &blocks)) {
    return error;
  }
  if (blocks == 0) return message("%s: the device has no room for a block", kernels.name);
  blocks -=
      blocks / found.multiprocessors * std::clamp(plan.sm_margin, 0, found.multiprocessors - 1);
  shape.blocks.x = static_cast<unsigned>(std::min<int64_t>(blocks, items));
  if (const char* error = check(kernels.name, "cudaMemsetAsync",
                                cudaMemsetAsync(args.arrived, 0, plan.counter_bytes,
                                                static_cast<cudaStream_t>(stream)))) {
    return error;
  }
  // A process or a stream may have fewer multiprocessors than the device. The step runs on any.
  while (true) {
    const cudaError_t error = try_launch(kernels.name, kernels.step, shape, stream, args);
    if (!lacks_room(shape, error) || shape.blocks.x == 1)
      return check(kernels.name, "launch", error);
    static_cast<void>(cudaGetLastError());
    shape.blocks.x /= 2;
  }
}

}  // namespace batchops::cuda::optimizer
