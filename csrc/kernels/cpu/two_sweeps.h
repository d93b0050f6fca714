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
// Small tensors are handed out together until they are worth a thread's trip to the counter.
constexpr int64_t kGrab = 32 * 1024;
// Larger tensors take their two sweeps together up to this size: what the first one has read is
// still in the cores' caches for the second.
constexpr int64_t kGroup = 128 * 1024;

// Chunks that a core's second-level cache holds all of: while they go through the second sweep, the
// memory has nothing to do.
constexpr int64_t kCached = 6;

inline int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Algorithm gives
//   kWhole                        elements up to which a tensor is one thread's work from the norms
//                                 to the update: nobody waits, and its cache holds what comes again
//   tensors, tensor_count
//   Sums                          of a chunk, zero by default, with +=
//   Outcome                       what the second sweep needs of a tensor
//   first(chunk, index, sums)     adds to sums
//   outcome(index, sums)
//   second(chunk, index, outcome, ahead)
//
// Large tensors go through in stages of one or a few. In a stage each thread has a share of the
// chunks, for both sweeps: what the first has read is in the thread's own cache when the second
// comes back through it, last chunk first. A thread whose share is taken goes on with another's.
//
// The second sweep of a tensor waits for its first. That cannot hang for any number of threads, one
// included: who waits has seen all chunks of the stage's first sweep taken, and who works on one
// waits for nothing.
template <class Algorithm>
class TwoSweeps {
  using Sums = typename Algorithm::Sums;
  using Outcome = typename Algorithm::Outcome;

 public:
  TwoSweeps(const Algorithm& algorithm, const Parallel& par) : algorithm_(algorithm), par_(par) {
    plan();
  }

  void run() {
    std::atomic<size_t> next{0};
    par_(workers_, [&](int64_t worker, int64_t) {
      for (const Stage& stage : stages_) {
        for_shares(stage, worker, &Share::first_taken,
                   [&](const Share& share, int64_t i) { first(chunks_[share.begin + i]); });
        const Share* const later = next_share(stage, worker);
        for_shares(stage, worker, &Share::second_taken, [&](const Share& share, int64_t i) {
          const bool asks = later != nullptr && share.size() <= kCached && i < later->size();
          second(chunks_[share.end - 1 - i],
                 asks ? Ahead(elements(chunks_[later->begin + i])) : Ahead());
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
          whole(small_[k], after < 0 ? -1 : small_[after]);
        }
      }
    });
  }

 private:
  // A tensor of several chunks: its sums, and how many chunks still owe theirs.
  struct Split {
    std::atomic<int64_t> pending{0};
    std::atomic<bool> ready{false};
    Outcome outcome;                // once ready
    int64_t first = 0, chunks = 0;  // of chunks_ and sums_
  };
  struct Chunk {
    int32_t split, tensor;
    int64_t begin, end;  // elements of the tensor
  };
  // Chunks of a stage that one thread begins with.
  struct alignas(64) Share {
    std::atomic<int64_t> first_taken{0}, second_taken{0};
    int64_t begin = 0, end = 0;
    int64_t size() const { return end - begin; }
  };
  struct Stage {
    int64_t begin, shares;  // of shares_
  };
  // Small tensors, in the order of small_.
  struct Grab {
    int64_t begin, end;
  };

  int64_t numel(int64_t i) const { return algorithm_.tensors[i].numel; }

  void plan() {
    std::vector<int32_t> large;
    int64_t chunks = 0;
    for (int64_t i = 0; i < algorithm_.tensor_count; ++i) {
      if (numel(i) > Algorithm::kWhole) {
        large.push_back(static_cast<int32_t>(i));
        chunks += chunk_count(numel(i));
      } else if (numel(i) > 0) {
        small_.push_back(static_cast<int32_t>(i));
      }
    }
    splits_ = std::vector<Split>(large.size());
    sums_.resize(chunks);
    chunks_.reserve(chunks);
    const int64_t threads = std::max(par_.threads, 1);
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (size_t begin = 0, end; begin < large.size(); begin = end) {
      int64_t elements = 0;
      const auto stage_begin = static_cast<int64_t>(chunks_.size());
      for (end = begin; end < large.size(); ++end) {
        const int64_t count = numel(large[end]);
        if (elements > 0 && elements + count > kGroup) break;
        Split& split = splits_[end];
        split.first = static_cast<int64_t>(chunks_.size());
        split.chunks = chunk_count(count);
        split.pending = split.chunks;
        for (int64_t at = 0; at < count; at += kChunk) {
          chunks_.push_back(
              {static_cast<int32_t>(end), large[end], at, std::min(at + kChunk, count)});
        }
        elements += count;
      }
      const int64_t size = static_cast<int64_t>(chunks_.size()) - stage_begin;
      const int64_t shares = std::min(threads, size);
      stages_.push_back({static_cast<int64_t>(ranges.size()), shares});
      for (int64_t k = 0; k < shares; ++k) {
        ranges.emplace_back(stage_begin + size * k / shares, stage_begin + size * (k + 1) / shares);
      }
    }
    shares_ = std::vector<Share>(ranges.size());
    for (size_t k = 0; k < ranges.size(); ++k) {
      shares_[k].begin = ranges[k].first;
      shares_[k].end = ranges[k].second;
    }
    for (size_t begin = 0, end; begin < small_.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < small_.size() && elements < kGrab; ++end) {
        elements += numel(small_[end]);
      }
      grabs_.push_back({static_cast<int64_t>(begin), static_cast<int64_t>(end)});
    }
    workers_ = std::min(threads, static_cast<int64_t>(chunks_.size() + grabs_.size()));
  }

  // Calls f(share, i) for what is left of the worker's share, then of the others'.
  template <class F>
  void for_shares(const Stage& stage, int64_t worker, std::atomic<int64_t> Share::* taken, F&& f) {
    for (int64_t k = 0; k < stage.shares; ++k) {
      Share& share = shares_[stage.begin + (worker + k) % stage.shares];
      std::atomic<int64_t>& next = share.*taken;
      while (next.load(std::memory_order_relaxed) < share.size()) {
        const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i < share.size()) f(share, i);
      }
    }
  }

  // The share that the worker begins the next stage with; null where it has none.
  const Share* next_share(const Stage& stage, int64_t worker) const {
    const Stage* const next = &stage + 1;
    return next < stages_.data() + stages_.size() && worker < next->shares
               ? &shares_[next->begin + worker]
               : nullptr;
  }

  OptimizerChunk elements(const Chunk& chunk) const {
    return {&algorithm_.tensors[chunk.tensor], chunk.begin, chunk.end - chunk.begin};
  }
  void first(const Chunk& chunk) {
    Split& split = splits_[chunk.split];
    algorithm_.first(elements(chunk), chunk.tensor, sums_[&chunk - chunks_.data()]);
    if (split.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      Sums total;
      for (int64_t k = 0; k < split.chunks; ++k) total += sums_[split.first + k];
      split.outcome = algorithm_.outcome(chunk.tensor, total);
      split.ready.store(true, std::memory_order_release);
    }
  }
  void second(const Chunk& chunk, const Ahead& ahead) {
    const Split& split = splits_[chunk.split];
    for (int spins = 0; !split.ready.load(std::memory_order_acquire); ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    algorithm_.second(elements(chunk), chunk.tensor, split.outcome, ahead);
  }

  // `later` is the thread's next tensor, or -1.
  void whole(int32_t tensor, int32_t later) const {
    const int64_t count = numel(tensor);
    const auto chunk_of = [&](int32_t i, int64_t at) {
      return OptimizerChunk{&algorithm_.tensors[i], at, std::min(numel(i) - at, kChunk)};
    };
    const auto chunk_at = [&](int64_t at) { return chunk_of(tensor, at); };
    Sums total;
    for (int64_t at = 0; at < count; at += kChunk) {
      Sums sums;
      algorithm_.first(chunk_at(at), tensor, sums);
      total += sums;
    }
    const Outcome outcome = algorithm_.outcome(tensor, total);
    for (int64_t at = (chunk_count(count) - 1) * kChunk, done = 0; at >= 0;
         at -= kChunk, done += kChunk) {
      const bool asks = later >= 0 && done < numel(later);
      algorithm_.second(chunk_at(at), tensor, outcome,
                        asks ? Ahead(chunk_of(later, done)) : Ahead());
    }
  }

  const Algorithm& algorithm_;
  const Parallel& par_;
  std::vector<int32_t> small_;
  std::vector<Grab> grabs_;
  std::vector<Split> splits_;
  std::vector<Chunk> chunks_;
  std::vector<Sums> sums_;  // of the chunks
  std::vector<Stage> stages_;
  std::vector<Share> shares_;
  int64_t workers_ = 0;
};

}  // namespace batchops
