// An optimizer's step over any number of tensors: a first sweep gives each tensor's sums, the sums
// its factors, and a second sweep the update. One parallel region whatever their number.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "kernels/cpu/optimizer_chunks.h"

namespace batchops {

// A chunk's p, g, m and v (256 KB in float32) stay in a core's second-level cache.
constexpr int64_t kChunk = 16 * 1024;
// A tensor up to here is one thread's work from the norms to the update, so nobody waits.
constexpr int64_t kWhole = 64 * 1024;
// Small tensors are handed out together until they are worth a thread's trip to the counter.
constexpr int64_t kGrab = 32 * 1024;
// Larger tensors take their two sweeps together up to this size: what the first one has read is
// still in the cores' caches for the second.
constexpr int64_t kGroup = 128 * 1024;

inline int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Algorithm gives
//   tensors, tensor_count
//   Sums                          of a chunk, zero by default, with +=
//   Outcome                       what the second sweep needs of a tensor
//   first(chunk, index, sums)     adds to sums
//   outcome(index, sums)
//   second(chunk, index, outcome)
//
// Tasks are taken in order from a counter; the second sweep of a tensor waits for its first. That
// cannot hang for any number of threads, one included: when somebody waits, all tasks of the first
// sweep have been taken before, and who works on one waits for nothing.
template <class Algorithm>
class TwoSweeps {
  using Sums = typename Algorithm::Sums;
  using Outcome = typename Algorithm::Outcome;

 public:
  explicit TwoSweeps(const Algorithm& algorithm) : algorithm_(algorithm) { plan(); }

  void run(const Parallel& par) {
    std::atomic<size_t> next{0};
    const auto worker = [&](int64_t, int64_t) {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) {
        perform(tasks_[i]);
      }
    };
    par(std::min<int64_t>(par.threads, static_cast<int64_t>(tasks_.size())), worker);
  }

 private:
  // A tensor of several chunks: its sums, and how many chunks still owe theirs.
  struct Split {
    std::atomic<int64_t> pending{0};
    std::atomic<bool> ready{false};
    Outcome outcome;                // once ready
    int64_t first = 0, chunks = 0;  // slots of the partial sums
  };
  struct Task {
    enum Kind : int32_t { first, second, whole } kind;
    int32_t split;       // first, second
    int64_t slot;        // first: where the partial sums go
    int64_t begin, end;  // elements of the tensor; whole: tensors, in the order of small_
    int32_t tensor;
  };

  int64_t numel(int64_t i) const { return algorithm_.tensors[i].numel; }

  void plan() {
    std::vector<int32_t> large;
    int64_t slots = 0;
    for (int64_t i = 0; i < algorithm_.tensor_count; ++i) {
      if (numel(i) > kWhole) {
        large.push_back(static_cast<int32_t>(i));
        slots += chunk_count(numel(i));
      } else if (numel(i) > 0) {
        small_.push_back(static_cast<int32_t>(i));
      }
    }
    splits_ = std::vector<Split>(large.size());
    sums_.resize(slots);
    tasks_.reserve(2 * slots + small_.size());

    slots = 0;
    for (size_t begin = 0, end; begin < large.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < large.size(); ++end) {
        const int64_t count = numel(large[end]);
        if (elements > 0 && elements + count > kGroup) break;
        Split& split = splits_[end];
        split.first = slots;
        split.chunks = chunk_count(count);
        split.pending = split.chunks;
        for (int64_t at = 0; at < count; at += kChunk) {
          tasks_.push_back({Task::first, static_cast<int32_t>(end), slots++, at,
                            std::min(at + kChunk, count), large[end]});
        }
        elements += count;
      }
      // Back to front: what was touched last is the likeliest to be cached.
      for (size_t k = end; k-- > begin;) {
        const int64_t count = numel(large[k]);
        for (int64_t at = (chunk_count(count) - 1) * kChunk; at >= 0; at -= kChunk) {
          tasks_.push_back({Task::second, static_cast<int32_t>(k), 0, at,
                            std::min(at + kChunk, count), large[k]});
        }
      }
    }
    for (size_t begin = 0, end; begin < small_.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < small_.size() && elements < kGrab; ++end) {
        elements += numel(small_[end]);
      }
      tasks_.push_back(
          {Task::whole, -1, 0, static_cast<int64_t>(begin), static_cast<int64_t>(end), -1});
    }
  }

  void perform(const Task& task) {
    if (task.kind == Task::whole) {
      for (int64_t i = task.begin; i < task.end; ++i) whole(small_[i]);
      return;
    }
    const OptimizerChunk chunk{&algorithm_.tensors[task.tensor], task.begin, task.end - task.begin};
    Split& split = splits_[task.split];
    if (task.kind == Task::first) {
      algorithm_.first(chunk, task.tensor, sums_[task.slot]);
      if (split.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        Sums total;
        for (int64_t k = 0; k < split.chunks; ++k) total += sums_[split.first + k];
        split.outcome = algorithm_.outcome(task.tensor, total);
        split.ready.store(true, std::memory_order_release);
      }
    } else {
      for (int spins = 0; !split.ready.load(std::memory_order_acquire); ++spins) {
        if (spins > 1000) std::this_thread::yield();
      }
      algorithm_.second(chunk, task.tensor, split.outcome);
    }
  }

  void whole(int32_t tensor) const {
    const int64_t count = numel(tensor);
    const auto chunk_at = [&](int64_t at) {
      return OptimizerChunk{&algorithm_.tensors[tensor], at, std::min(count - at, kChunk)};
    };
    Sums total;
    for (int64_t at = 0; at < count; at += kChunk) {
      Sums sums;
      algorithm_.first(chunk_at(at), tensor, sums);
      total += sums;
    }
    const Outcome outcome = algorithm_.outcome(tensor, total);
    for (int64_t at = (chunk_count(count) - 1) * kChunk; at >= 0; at -= kChunk) {
      algorithm_.second(chunk_at(at), tensor, outcome);
    }
  }

  const Algorithm& algorithm_;
  std::vector<int32_t> small_;
  std::vector<Split> splits_;
  std::vector<Sums> sums_;
  std::vector<Task> tasks_;
};

}  // namespace batchops
