// An optimizer's step over any number of tensors as one cooperative launch.
//
// Block b takes items b, b + blocks, b + 2·blocks, … of the table. The first sweep over a chunk
// gives its sums, which go to the workspace, and two floats an element, which the block keeps in a
// slot of its shared memory. Who brings the last of a tensor's chunks adds the sums up, in the
// order of the chunks, and publishes the tensor's outcome. Meanwhile the others go on to further
// chunks; when its slots are full, a block waits for the outcome of the tensor it keeps longest,
// makes the second sweep over that chunk from what it has kept, and so frees the slot. Of a tensor
// with more chunks than the slots of all blocks hold, the first ones are not kept: their second
// sweep reads the memory again, back to front. It gives the same bits.
//
// A small tensor is one warp's work from the sums to the update. Small tensors come last, and fill
// the time in which blocks would wait.
//
// Items go to blocks by turns rather than by tickets: chunks are of one size, a block knows from
// the start how many it will have of a tensor and so which of them to keep, and no chunk waits for
// a trip to a counter.
//
// Nobody waits for ever. All blocks are resident (a cooperative launch). With a clip they all meet
// once, before any of them waits for anything else. After that a block waits for a tensor
// only when it has made the first sweep over all of its own chunks of that tensor and of those
// before it: settle(), the only place that waits, is called for room for a chunk of a later tensor,
// or after the last of its own chunks of this one (those without room for them are not kept). So of
// the tensors without an outcome take the first: nobody who still owes it a chunk is waiting, for
// all that come before it have their outcome.
#pragma once
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/grad_squares.cuh"
#include "kernels/optimizer_factors.h"

namespace batchops::cuda::optimizer {

// Blocks of a multiprocessor: while one waits for memory or for the others the second works.
constexpr int kResident = 2;
constexpr int kSlotBytes = 2 * kChunk * static_cast<int>(sizeof(float));
// Sets that fit a launch's arguments, of which there are 4 KB.
constexpr int kMaxSets = 32;

// One float whose operations round once each, so that nothing is contracted.
struct F {
  float v;

  F() = default;
  BATCHOPS_DEVICE explicit F(float value) : v(value) {}
  BATCHOPS_DEVICE friend F operator+(F a, F b) { return F(__fadd_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a, F b) { return F(__fsub_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator*(F a, F b) { return F(__fmul_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator/(F a, F b) { return F(__fdiv_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a) { return F(-a.v); }
};
BATCHOPS_DEVICE F fused(F a, F b, F c) { return F(__fmaf_rn(a.v, b.v, c.v)); }
BATCHOPS_DEVICE F sqrt(F a) { return F(__fsqrt_rn(a.v)); }
BATCHOPS_DEVICE F max(F a, F b) { return a.v < b.v ? b : a; }
BATCHOPS_DEVICE F min(F a, F b) { return b.v < a.v ? b : a; }
BATCHOPS_DEVICE F select_le(F a, F b, F yes, F no) { return a.v <= b.v ? yes : no; }

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/compensated.inl"

// Where the threads of a block keep two floats an element. Each has places of its own, so that no
// barrier is needed, whatever tensor the slot was for before:
//
//   [2][kInFlight][kThreads] units of kWidth floats
struct Slot {
  float* floats;  // or null: there is no room

  // Elements n … n + W - 1 of those that are this thread's.
  template <int W>
  BATCHOPS_DEVICE void keep(int32_t n, const float (&a)[W], const float (&b)[W]) const {
    if (floats == nullptr) return;
    put<W>(place(n), a);
    put<W>(place(n) + kChunk, b);
  }
  template <int W>
  BATCHOPS_DEVICE void fetch(int32_t n, float (&a)[W], float (&b)[W]) const {
    to_float<float, W>(load_unit<float, W>(place(n)), a);
    to_float<float, W>(load_unit<float, W>(place(n) + kChunk), b);
  }

 private:
  BATCHOPS_DEVICE float* place(int32_t n) const {
    return floats + (n / kWidth * kThreads + static_cast<int>(threadIdx.x)) * kWidth + n % kWidth;
  }
  template <int W>
  static BATCHOPS_DEVICE void put(float* to, const float (&from)[W]) {
    if constexpr (W == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
    } else {
      static_assert(W == 1);
      *to = from[0];
    }
  }
};

// The low-precision copies of masters, P, that have changed.
template <class P, int W>
BATCHOPS_DEVICE void publish(const Entry& x, int64_t begin, int32_t unit, const float (&p)[W]) {
  const DType dtype = static_cast<DType>(x.p_dtype);
  if constexpr (std::is_same_v<P, Any>) {
    Memory<Any>(x.p, dtype, begin).store<W>(unit, p);
  } else if constexpr (std::is_same_v<P, float>) {
    with_element(dtype, [&](auto type) {
      Memory<typename decltype(type)::type>(x.p, dtype, begin).template store<W>(unit, p);
    });
  }
}

BATCHOPS_DEVICE bool skipped(const DeviceNumbers& device) {
  return device.found_inf != nullptr && *device.found_inf != 0;
}

// Algorithm gives
//   kSums                            doubles that are added up over a tensor
//   Group, Set                       hyperparameters; Set(group, step, excluded)
//   with_rates(group, rates)         the group with those of its numbers that are on the device
//   Factors(Set, C)                  what sweeps make of them; C is what gradients are divided by
//   Outcome                          what the second sweep needs of a tensor
//   outcome(Set, sums, numel, C, grad_scale, stats)
//   kGradAgain                       whether the second sweep reads g where nothing was kept
//   first<P, G, W>(entry, units, factors, slot, sums)        adds to sums; see with_units
//   second<kKept, P, G, W>(entry, units, factors, outcome, slot)
template <class Algorithm>
struct StepArguments {
  using Set = typename Algorithm::Set;
  using Outcome = typename Algorithm::Outcome;

  Table table;
  int32_t slots;  // of a block
  // The workspace. Counters are 0 at first.
  unsigned* arrived;   // blocks that have added up their gradients' squares
  unsigned* arrivals;  // [tensors], chunks that have their sums, and one more for the outcome
  GradSquares squares;
  double* sums;       // [chunks, kSums]
  Outcome* outcomes;  // [tensors]
  // Where they are too many for arguments; or, with `by_tensor`, made of step counts on the device.
  const Set* more_sets;
  bool by_tensor;
  // The clip: none with max_grad_norm 0; over more tensors than these with grad_sum_sq.
  const double* grad_sum_sq;
  double max_grad_norm, clip_eps, grad_scale;
  DeviceNumbers device;
  TensorStats* stats;  // or null
  Set sets[kMaxSets];

  BATCHOPS_DEVICE int32_t set_of(int32_t tensor) const {
    return by_tensor ? tensor : table.entries[tensor].set;
  }
  BATCHOPS_DEVICE const Set& set(int32_t index) const {
    return more_sets == nullptr ? sets[index] : more_sets[index];
  }
  BATCHOPS_DEVICE double scale() const {
    return device.grad_scale == nullptr ? grad_scale : *device.grad_scale;
  }
};

template <class Algorithm>
class Step {
  static constexpr int kSums = Algorithm::kSums;
  using Factors = typename Algorithm::Factors;
  using Outcome = typename Algorithm::Outcome;

 public:
  // `slots`: the dynamic shared memory.
  BATCHOPS_DEVICE Step(const StepArguments<Algorithm>& args, float* slots)
      : args_(args), slots_(slots) {}

  BATCHOPS_DEVICE void run() {
    if (skipped(args_.device)) return forget_stats();
    find_divisor();
    for (int32_t item = static_cast<int32_t>(blockIdx.x);; item += blocks()) {
      const bool over = item >= args_.table.items();
      const bool kept = over || is_kept(item);
      const int32_t left_out = left_out_before(item);
      settle(item, over || !kept || left_out >= 0 ? 0 : args_.slots - 1);
      if (left_out >= 0) sweep_again(left_out);
      if (over) break;
      sweep(item, kept);
    }
  }

 private:
  static BATCHOPS_DEVICE int32_t blocks() { return static_cast<int32_t>(gridDim.x); }
  static BATCHOPS_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static BATCHOPS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // What gradients are divided by.
  static BATCHOPS_DEVICE double& divisor() {
    BATCHOPS_SHARED(divisor, double);
    return divisor;
  }
  BATCHOPS_DEVICE void find_divisor() const {
    double by = args_.scale();
    if (args_.max_grad_norm > 0) {
      double sum_sq;
      if (args_.grad_sum_sq != nullptr) {
        sum_sq = *args_.grad_sum_sq;
      } else {
        args_.squares.add_up(args_.table);
        if (threadIdx.x == 0) {
          __threadfence();
          atomicAdd(args_.arrived, 1u);
          wait_for(args_.arrived, gridDim.x);
        }
        __syncthreads();
        sum_sq = args_.squares.total();
      }
      by = grad_divisor(sum_sq, args_.max_grad_norm, args_.clip_eps, args_.scale());
    }
    if (threadIdx.x == 0) divisor() = by;
    __syncthreads();
  }

  // By one thread; a barrier follows.
  static BATCHOPS_DEVICE void wait_for(const unsigned* counter, unsigned count) {
    while (*static_cast<const volatile unsigned*>(counter) < count) __nanosleep(20);
    __threadfence();
  }

  // The factors of the set that the warp is at: mostly that of the tensor before.
  static BATCHOPS_DEVICE Factors& factors() {
    BATCHOPS_SHARED(factors, Factors[kWarps]);
    return factors[warp()];
  }
  BATCHOPS_DEVICE void use_set_of(int32_t tensor) {
    const int32_t set = args_.set_of(tensor);
    if (set == set_) return;
    set_ = set;
    __syncwarp();
    if (lane() == 0) factors() = Factors(args_.set(set_), divisor());
    __syncwarp();
  }

  BATCHOPS_DEVICE bool is_chunk(int32_t item) const { return item < args_.table.chunks; }
  BATCHOPS_DEVICE const Entry& entry(int32_t tensor) const { return args_.table.entries[tensor]; }
  // The tensor of a chunk, or this warp's small one; below 0 where there is none left for it.
  BATCHOPS_DEVICE int32_t tensor_of(int32_t item) const {
    const Table& table = args_.table;
    if (is_chunk(item)) return table.tensor_of[item];
    const int32_t index = (item - table.chunks) * kWarps + warp();
    return index < table.smalls ? table.tensor_of[table.chunks + index] : -1;
  }
  BATCHOPS_DEVICE Part part_of(int32_t item, const Entry& x) const {
    return is_chunk(item) ? Part(x, item) : Part(x);
  }

  // Whether a block's slots hold its chunks of the item's tensor from the item on.
  BATCHOPS_DEVICE bool is_kept(int32_t item) const {
    if (!is_chunk(item)) return true;
    return entry(tensor_of(item)).last_chunk() - item < args_.slots * blocks();
  }
  // The last chunk not kept of the tensor that ends, for this block, right before the item; below 0
  // where there is none.
  BATCHOPS_DEVICE int32_t left_out_before(int32_t item) const {
    const int32_t last = item - blocks();
    if (last < 0 || !is_chunk(last)) return -1;
    const Entry& x = entry(tensor_of(last));
    const int32_t left_out = last - args_.slots * blocks();
    return item > x.last_chunk() && left_out >= x.first_chunk ? left_out : -1;
  }

  // The slot so many places before the next free one.
  BATCHOPS_DEVICE Slot slot(int32_t before) const {
    const int32_t i = next_slot_ - before;
    return {slots_ + (i < 0 ? i + args_.slots : i) * (2 * kChunk)};
  }

  BATCHOPS_DEVICE void sweep(int32_t item, bool kept) {
    const int32_t tensor = tensor_of(item);
    double sums[kSums] = {};
    if (tensor >= 0) {
      const Entry& x = entry(tensor);
      use_set_of(tensor);
      const Slot free = kept ? slot(0) : Slot{};
      with_units<true>(part_of(item, x), [&](auto p, auto g, auto width, const Units& units) {
        Algorithm::template first<typename decltype(p)::type, typename decltype(g)::type,
                                  decltype(width)::value>(x, units, factors(), free, sums);
      });
    }
    if (kept) {
      ++kept_;
      next_slot_ = next_slot_ + 1 == args_.slots ? 0 : next_slot_ + 1;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
    if (is_chunk(item)) {
      arrive(item, sums);
    } else if (tensor >= 0 && lane() == 0) {
      find_outcome(tensor, sums);
    }
  }

  // Second sweeps over the items that are kept longest, of those before `item`, until at most
  // `most` are kept.
  BATCHOPS_DEVICE void settle(int32_t item, int32_t most) {
    for (; kept_ > most; --kept_) {
      const int32_t oldest = item - kept_ * blocks();
      const int32_t tensor = tensor_of(oldest);
      if (!is_chunk(oldest)) {
        __syncwarp();  // its outcome is of this warp's lane 0
        if (tensor < 0) continue;
      } else if (tensor != settled_) {
        settled_ = tensor;
        if (threadIdx.x == 0) {
          wait_for(&args_.arrivals[tensor], static_cast<unsigned>(entry(tensor).chunks()) + 1);
        }
        __syncthreads();
      }
      second<true>(part_of(oldest, entry(tensor)), args_.outcomes[tensor], slot(kept_));
    }
  }

  // Where the part was kept, the factors may be those of a later tensor.
  template <bool kKept>
  BATCHOPS_DEVICE void second(const Part& part, const Outcome& outcome, const Slot& slot) const {
    constexpr bool kGrad = Algorithm::kGradAgain && !kKept;
    with_units<kGrad>(part, [&](auto p, auto g, auto width, const Units& units) {
      Algorithm::template second<kKept, typename decltype(p)::type, typename decltype(g)::type,
                                 decltype(width)::value>(part.x, units, factors(), outcome, slot);
    });
  }

  // The second sweep over this block's chunks that were not kept, of the tensor settled last; back
  // to front, for what was read last is still in the L2 cache.
  BATCHOPS_DEVICE void sweep_again(int32_t last) const {
    const Entry& x = entry(settled_);
    for (int32_t item = last; item >= x.first_chunk; item -= blocks()) {
      second<false>(Part(x, item), args_.outcomes[settled_], Slot{});
    }
  }

  // Brings the sums of a chunk, of which each warp has its share. The first warp goes on with them
  // alone, the others up to the next chunk's sums.
  BATCHOPS_DEVICE void arrive(int32_t item, double (&sums)[kSums]) const {
    BATCHOPS_SHARED(by_warp, double[kSums][kWarps]);
    __syncthreads();
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) by_warp[i][warp()] = sums[i];
    }
    __syncthreads();
    if (warp() > 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(lane() < kWarps ? by_warp[i][lane()] : 0.0);
    const int32_t tensor = tensor_of(item);
    unsigned before = 0;
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) args_.sums[int64_t{item} * kSums + i] = sums[i];
      __threadfence();
      before = atomicAdd(&args_.arrivals[tensor], 1u);
      __threadfence();
    }
    const Entry& x = entry(tensor);
    const int32_t chunks = x.chunks();
    if (__shfl_sync(kAllLanes, before, 0) + 1 < static_cast<unsigned>(chunks)) return;

    // All of the tensor's sums are there.
    __syncwarp();
    const double* of_chunk = args_.sums + int64_t{x.first_chunk} * kSums;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
#pragma unroll 4
    for (int32_t k = lane(); k < chunks; k += kWarp) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += of_chunk[int64_t{k} * kSums + i];
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
    if (lane() == 0) {
      find_outcome(tensor, sums);
      __threadfence();
      atomicAdd(&args_.arrivals[tensor], 1u);
    }
  }

  BATCHOPS_DEVICE void find_outcome(int32_t tensor, const double (&sums)[kSums]) const {
    TensorStats stats;
    args_.outcomes[tensor] =
        Algorithm::outcome(args_.set(args_.set_of(tensor)), sums, entry(tensor).numel, divisor(),
                           args_.scale(), stats);
    if (args_.stats != nullptr) args_.stats[tensor] = stats;
  }

  // Of a step that is skipped.
  BATCHOPS_DEVICE void forget_stats() const {
    if (args_.stats == nullptr) return;
    constexpr float nothing = std::numeric_limits<float>::quiet_NaN();
    for (int32_t i = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
         i < args_.table.tensors; i += blocks() * kThreads) {
      args_.stats[i] = {nothing, nothing, nothing, nothing};
    }
  }

  const StepArguments<Algorithm>& args_;
  float* slots_;
  int32_t kept_ = 0;  // of the last items, in slots by turns
  int32_t next_slot_ = 0;
  int32_t set_ = -1;
  int32_t settled_ = -1;  // a tensor whose outcome is known to be there
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
  const Entry& x = args.table.entries[i];
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
    counter_bytes = cutter.bytes();
    args.squares.sums = cutter.take<double>(args.squares.pieces);
    args.sums = cutter.take<double>(size_t{Algorithm::kSums} * args.table.chunks);
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

// Slots that a block has where kResident of them share a multiprocessor.
inline int32_t slots_of(const Device& device) {
  constexpr int kReserved = 1024;  // by the driver, of each block
  constexpr int kStatic = 1024;    // what Step declares, rounded up
  const int share = device.shared_of_all / kResident - kReserved;
  return ((share < device.shared ? share : device.shared) - kStatic) / kSlotBytes;
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
  args.slots = std::max(slots_of(found), 1);
  LaunchShape shape{dim3(1, 1, 1), dim3(kThreads, 1, 1),
                    static_cast<size_t>(args.slots) * kSlotBytes};
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
    if (!lacks_room(error) || shape.blocks.x == 1) return check(kernels.name, "launch", error);
    static_cast<void>(cudaGetLastError());
    shape.blocks.x /= 2;
  }
}

}  // namespace batchops::cuda::optimizer
