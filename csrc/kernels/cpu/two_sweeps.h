// An optimizer's step over any number of tensors: a first sweep gives each tensor's sums, the sums
// its factors, and a second sweep the update. One parallel region whatever their number.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "kernels/cpu/optimizer_chunks.h"

namespace batchops {

// A chunk's p, g, m and v (256 KB in float32) stay in a core's second-level cache.
constexpr int64_t kChunk = 16 * 1024;
// Small tensors are handed out together until they are worth a thread's trip to the counter.
constexpr int64_t kGrab = 32 * 1024;
// Chunks that a core's second-level cache holds all of: while they go through the second sweep, the
// memory has nothing to do.
constexpr int64_t kCached = 6;

constexpr int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// A float for each element of the chunks that a thread was at last. The memory stays with the
// thread.
template <int64_t kSlots>
class KeptChunks {
 public:
  KeptChunks() {
    if constexpr (kSlots > 0) {
      constexpr size_t kLine = 64 / sizeof(float);
      thread_local std::unique_ptr<float[]> memory(
          new (std::nothrow) float[kSlots * kChunk + kLine]);
      if (memory == nullptr) return;  // then nothing is kept
      const auto address = reinterpret_cast<uintptr_t>(memory.get());
      memory_ = memory.get() + (64 - address % 64) / sizeof(float);
    }
  }

  // Room for a chunk, in the place of another one; or null.
  float* take(int32_t tensor, int64_t chunk) {
    if (memory_ == nullptr) return nullptr;
    tag_of(chunk) = {tensor, chunk};
    return place_of(chunk);
  }
  // What was left there, or null.
  const float* find(int32_t tensor, int64_t chunk) {
    if (memory_ == nullptr) return nullptr;
    const Tag& tag = tag_of(chunk);
    return tag.tensor == tensor && tag.chunk == chunk ? place_of(chunk) : nullptr;
  }

 private:
  struct Tag {
    int32_t tensor = -1;
    int64_t chunk = 0;
  };
  static constexpr int64_t kMost = std::max<int64_t>(kSlots, 1);
  Tag& tag_of(int64_t chunk) { return tags_[chunk % kMost]; }
  float* place_of(int64_t chunk) { return memory_ + chunk % kMost * kChunk; }

  float* memory_ = nullptr;
  Tag tags_[kMost];
};

// Algorithm gives
//   kWhole                        elements up to which a tensor is one thread's work from the norms
//                                 to the update: nobody waits, and its cache holds what comes again
//   tensors, tensor_count
//   Sums                          of a chunk, zero by default, with +=
//   Outcome                       what the second sweep needs of a tensor
//   kKeeps                        whether there is something to keep between the sweeps
//   first(chunk, index, kept, sums)            adds to sums; kept: a float an element, or null
//   outcome(index, sums)
//   second(chunk, index, outcome, kept, ahead) kept: what the first has left there, or null
//
// Larger tensors go through one after the other. Each thread has a share of the chunks, for both
// sweeps: what the first has read is in the thread's own cache when the second comes back through
// it, last chunk first. A thread whose share is taken goes on with another's.
//
// The second sweep of a tensor waits for its first. That cannot hang for any number of threads, one
// included: who waits has seen all chunks of the first sweep taken, and who works on one waits for
// nothing.
template <class Algorithm>
class TwoSweeps {
  using Sums = typename Algorithm::Sums;
  using Outcome = typename Algorithm::Outcome;
  static constexpr int64_t kKept = Algorithm::kKeeps ? chunk_count(Algorithm::kWhole) : 0;
  using Kept = KeptChunks<kKept>;

 public:
  TwoSweeps(const Algorithm& algorithm, const Parallel& par) : algorithm_(algorithm), par_(par) {
    plan();
  }

  void run() {
    std::atomic<size_t> next{0};
    par_(workers_, [&](int64_t worker, int64_t) {
      Kept kept;
      for (size_t k = 0; k < large_.size(); ++k) {
        Large& x = large_[k];
        for_shares(x, worker, &Share::first_taken, [&](const Share& share, int64_t i) {
          first(x, share.begin + i, kept, share.size() - i <= kKept);
        });
        const Share* const later = share_of(k + 1, worker);
        for_shares(x, worker, &Share::second_taken, [&](const Share& share, int64_t i) {
          const bool asks = later != nullptr && share.size() <= kCached && i < later->size();
          second(x, share.end - 1 - i, kept,
                 asks ? Ahead(chunk_of(large_[k + 1].tensor, later->begin + i)) : Ahead());
        });
      }
      const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
      for (size_t i = take(), later; i < grabs_.size(); i = later) {
        later = take();  // now, so that it can be asked for
        const Grab& grab = grabs_[i];
        for (int64_t k = grab.begin; k < grab.end; ++k) {
          const int64_t after = k + 1 < grab.end        ? k + 1
                                : later < grabs_.size() ? grabs_[later].begin
                                                        : -1;
          whole(small_[k], after < 0 ? -1 : small_[after], kept);
        }
      }
    });
  }

 private:
  // Chunks of a tensor that one thread begins with.
  struct alignas(64) Share {
    std::atomic<int64_t> first_taken{0}, second_taken{0};
    int64_t begin = 0, end = 0;
    int64_t size() const { return end - begin; }
  };
  // A tensor that threads share: its sums, and how many chunks still owe theirs.
  struct Large {
    std::atomic<int64_t> pending{0};
    std::atomic<bool> ready{false};
    Outcome outcome;  // once ready
    int32_t tensor = 0;
    int64_t chunks = 0, sums = 0;         // sums: where they begin in sums_
    int64_t first_share = 0, shares = 0;  // of shares_
  };
  // Small tensors, in the order of small_.
  struct Grab {
    int64_t begin, end;
  };

  int64_t numel(int64_t i) const { return algorithm_.tensors[i].numel; }
  OptimizerChunk chunk_of(int32_t tensor, int64_t index) const {
    const int64_t begin = index * kChunk;
    return {&algorithm_.tensors[tensor], begin, std::min(numel(tensor) - begin, kChunk)};
  }

  void plan() {
    std::vector<int32_t> large;
    for (int64_t i = 0; i < algorithm_.tensor_count; ++i) {
      if (numel(i) > Algorithm::kWhole) {
        large.push_back(static_cast<int32_t>(i));
      } else if (numel(i) > 0) {
        small_.push_back(static_cast<int32_t>(i));
      }
    }
    const int64_t threads = std::max(par_.threads, 1);
    large_ = std::vector<Large>(large.size());
    int64_t chunks = 0, shares = 0;
    for (size_t k = 0; k < large.size(); ++k) {
      Large& x = large_[k];
      x.tensor = large[k];
      x.chunks = chunk_count(numel(x.tensor));
      x.pending = x.chunks;
      x.sums = chunks;
      x.first_share = shares;
      x.shares = std::min(threads, x.chunks);
      chunks += x.chunks;
      shares += x.shares;
    }
    sums_.resize(chunks);
    shares_ = std::vector<Share>(shares);
    for (const Large& x : large_) {
      for (int64_t k = 0; k < x.shares; ++k) {
        shares_[x.first_share + k].begin = x.chunks * k / x.shares;
        shares_[x.first_share + k].end = x.chunks * (k + 1) / x.shares;
      }
    }
    for (size_t begin = 0, end; begin < small_.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < small_.size() && elements < kGrab; ++end) {
        elements += numel(small_[end]);
      }
      grabs_.push_back({static_cast<int64_t>(begin), static_cast<int64_t>(end)});
    }
    workers_ = std::min(threads, chunks + static_cast<int64_t>(grabs_.size()));
  }

  // Calls f(share, i) for what is left of the worker's share, then of the others'.
  template <class F>
  void for_shares(const Large& x, int64_t worker, std::atomic<int64_t> Share::* taken, F&& f) {
    for (int64_t k = 0; k < x.shares; ++k) {
      Share& share = shares_[x.first_share + (worker + k) % x.shares];
      std::atomic<int64_t>& next = share.*taken;
      while (next.load(std::memory_order_relaxed) < share.size()) {
        const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i < share.size()) f(share, i);
      }
    }
  }
  // What the worker begins large tensor k with; null where it has no share or there is none.
  const Share* share_of(size_t k, int64_t worker) const {
    const bool has = k < large_.size() && worker < large_[k].shares;
    return has ? &shares_[large_[k].first_share + worker] : nullptr;
  }

  // `soon`: the second sweep begins with it, or nearly.
  void first(Large& x, int64_t index, Kept& kept, bool soon) {
    algorithm_.first(chunk_of(x.tensor, index), x.tensor,
                     soon ? kept.take(x.tensor, index) : nullptr, sums_[x.sums + index]);
    if (x.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      Sums total;
      for (int64_t k = 0; k < x.chunks; ++k) total += sums_[x.sums + k];
      x.outcome = algorithm_.outcome(x.tensor, total);
      x.ready.store(true, std::memory_order_release);
    }
  }
  void second(const Large& x, int64_t index, Kept& kept, const Ahead& ahead) const {
    for (int spins = 0; !x.ready.load(std::memory_order_acquire); ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    algorithm_.second(chunk_of(x.tensor, index), x.tensor, x.outcome, kept.find(x.tensor, index),
                      ahead);
  }

  // `later` is the thread's next tensor, or -1.
  void whole(int32_t tensor, int32_t later, Kept& kept) const {
    const int64_t chunks = chunk_count(numel(tensor));
    Sums total;
    for (int64_t k = 0; k < chunks; ++k) {
      Sums sums;
      algorithm_.first(chunk_of(tensor, k), tensor, kept.take(tensor, k), sums);
      total += sums;
    }
    const Outcome outcome = algorithm_.outcome(tensor, total);
    for (int64_t k = 0; k < chunks; ++k) {
      const bool asks = later >= 0 && k < chunk_count(numel(later));
      const int64_t index = chunks - 1 - k;
      algorithm_.second(chunk_of(tensor, index), tensor, outcome, kept.find(tensor, index),
                        asks ? Ahead(chunk_of(later, k)) : Ahead());
    }
  }

  const Algorithm& algorithm_;
  const Parallel& par_;
  std::vector<int32_t> small_;
  std::vector<Grab> grabs_;
  std::vector<Large> large_;
  std::vector<Share> shares_;
  std::vector<Sums> sums_;
  int64_t workers_ = 0;
};

}  // namespace batchops
