#include "kernels/lamb.h"

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "kernels/cpu/lamb_chunks.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/lamb_body.inl"
#include "kernels/cpu/for_each_isa.inl"

namespace batchops {
namespace {

// A chunk's p, g, m and v (256 KB in float32) stay in a core's second-level cache.
constexpr int64_t kChunk = 16 * 1024;
// A tensor up to here is one thread's work from the norms to the update, so nobody waits.
constexpr int64_t kWhole = 64 * 1024;
// Small tensors are handed out together until they are worth a thread's trip to the counter.
constexpr int64_t kGrab = 32 * 1024;
// Larger tensors take their two sweeps together up to this size: what the first one has read is
// still in the shared cache for the second.
constexpr int64_t kGroup = 512 * 1024;

// A tensor of several chunks: its norms, and how many chunks still owe theirs.
struct Split {
  std::atomic<int64_t> pending{0};
  std::atomic<bool> ready{false};
  LambStepFactors step;           // once ready
  int64_t first = 0, chunks = 0;  // slots of the partial norms
};

struct Task {
  enum Kind : int32_t { moments, apply, whole } kind;
  int32_t split;       // moments, apply
  int64_t slot;        // moments: where the partial norms go
  int64_t begin, end;  // elements of the tensor; whole: tensors, in the order of `order`
  int32_t tensor;
};

int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// One parallel region. Tasks are taken in order from a counter; the second sweep of a tensor waits
// for its first. That cannot hang for any number of threads, one included: when somebody waits, all
// tasks of the first sweep have been taken before, and who works on one waits for nothing.
class Step {
 public:
  Step(const LambArgs& args, double C) : args_(args), set_of_(lamb_sets(args, sets_)) {
    for (const LambSet& set : sets_) factors_.emplace_back(set, C);
    plan();
  }

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
  void plan() {
    std::vector<int32_t> large;
    int64_t slots = 0;
    for (int64_t i = 0; i < args_.tensor_count; ++i) {
      const int64_t numel = args_.tensors[i].numel;
      if (numel > kWhole) {
        large.push_back(static_cast<int32_t>(i));
        slots += chunk_count(numel);
      } else if (numel > 0) {
        small_.push_back(static_cast<int32_t>(i));
      }
    }
    splits_ = std::vector<Split>(large.size());
    norms_.resize(slots);
    tasks_.reserve(2 * slots + small_.size());

    slots = 0;
    for (size_t begin = 0, end; begin < large.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < large.size(); ++end) {
        const int64_t numel = args_.tensors[large[end]].numel;
        if (elements > 0 && elements + numel > kGroup) break;
        Split& split = splits_[end];
        split.first = slots;
        split.chunks = chunk_count(numel);
        split.pending = split.chunks;
        for (int64_t at = 0; at < numel; at += kChunk) {
          tasks_.push_back({Task::moments, static_cast<int32_t>(end), slots++, at,
                            std::min(at + kChunk, numel), large[end]});
        }
        elements += numel;
      }
      // Back to front: what was touched last is the likeliest to be cached.
      for (size_t k = end; k-- > begin;) {
        const int64_t numel = args_.tensors[large[k]].numel;
        for (int64_t at = (chunk_count(numel) - 1) * kChunk; at >= 0; at -= kChunk) {
          tasks_.push_back({Task::apply, static_cast<int32_t>(k), 0, at,
                            std::min(at + kChunk, numel), large[k]});
        }
      }
    }
    for (size_t begin = 0, end; begin < small_.size(); begin = end) {
      int64_t elements = 0;
      for (end = begin; end < small_.size() && elements < kGrab; ++end) {
        elements += args_.tensors[small_[end]].numel;
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
    const LambTensor& x = args_.tensors[task.tensor];
    const LambSet& set = sets_[set_of_[task.tensor]];
    const LambFactors& factors = factors_[set_of_[task.tensor]];
    const LambChunk chunk{&x, task.begin, task.end - task.begin};
    Split& split = splits_[task.split];
    if (task.kind == Task::moments) {
      moments(chunk, factors, set.adapted ? &norms_[task.slot] : nullptr);
      if (split.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        double ratio = 1;
        if (set.adapted) {
          LambNorms norms;
          for (int64_t k = split.first; k < split.first + split.chunks; ++k) {
            norms.p_sq += norms_[k].p_sq;
            norms.u_sq += norms_[k].u_sq;
          }
          ratio = lamb_ratio(set, norms.p_sq, norms.u_sq);
        }
        split.step = LambStepFactors(set, ratio);
        split.ready.store(true, std::memory_order_release);
      }
    } else {
      for (int spins = 0; !split.ready.load(std::memory_order_acquire); ++spins) {
        if (spins > 1000) std::this_thread::yield();
      }
      apply(chunk, factors, split.step);
    }
  }

  void whole(int32_t tensor) const {
    const int64_t numel = args_.tensors[tensor].numel;
    const LambSet& set = sets_[set_of_[tensor]];
    const LambFactors& factors = factors_[set_of_[tensor]];
    LambNorms norms;
    for (int64_t at = 0; at < numel; at += kChunk) {
      moments(chunk_at(tensor, at), factors, set.adapted ? &norms : nullptr);
    }
    const LambStepFactors step(set, set.adapted ? lamb_ratio(set, norms.p_sq, norms.u_sq) : 1);
    for (int64_t at = (chunk_count(numel) - 1) * kChunk; at >= 0; at -= kChunk) {
      apply(chunk_at(tensor, at), factors, step);
    }
  }

  // The chunk that begins at `at`.
  LambChunk chunk_at(int32_t tensor, int64_t at) const {
    const LambTensor& x = args_.tensors[tensor];
    return {&x, at, std::min(x.numel - at, kChunk)};
  }

  static void moments(const LambChunk& chunk, const LambFactors& factors, LambNorms* norms) {
    BATCHOPS_ISA_CALL(lamb_moments, chunk, factors, norms);
  }
  static void apply(const LambChunk& chunk, const LambFactors& factors,
                    const LambStepFactors& step) {
    BATCHOPS_ISA_CALL(lamb_apply, chunk, factors, step);
  }

  const LambArgs& args_;
  std::vector<LambSet> sets_;
  std::vector<LambFactors> factors_;  // of each set
  std::vector<int32_t> set_of_;
  std::vector<int32_t> small_;
  std::vector<Split> splits_;
  std::vector<LambNorms> norms_;
  std::vector<Task> tasks_;
};

double chunk_grad_sq(const LambChunk& chunk) { return BATCHOPS_ISA_CALL(lamb_grad_sq, chunk); }

double grad_sum_sq(const LambArgs& args, const Parallel& par) {
  std::vector<LambChunk> chunks;
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    const LambTensor& x = args.tensors[i];
    for (int64_t at = 0; at < x.numel; at += kWhole) {
      chunks.push_back({&x, at, std::min(kWhole, x.numel - at)});
    }
  }
  // Back to front, so that the gradients the step begins with are the last ones read.
  std::vector<double> sums(chunks.size());
  par(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) sums[i] = chunk_grad_sq(chunks[i]);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

constexpr const char* kNoMemory = "lamb: out of memory for the list of tasks";

}  // namespace

const char* lamb_grad_sum_sq_cpu(const LambArgs& args, double* sum_sq, const Parallel& par) {
  try {
    *sum_sq = grad_sum_sq(args, par);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

const char* lamb_step_cpu(const LambArgs& args, const double* grad_sum_sq_of_all,
                          const Parallel& par) {
  try {
    double C = 1;
    if (args.max_grad_norm > 0) {
      const double sum_sq = grad_sum_sq_of_all ? *grad_sum_sq_of_all : grad_sum_sq(args, par);
      C = lamb_clip(sum_sq, args.max_grad_norm);
    }
    Step(args, C).run(par);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace batchops
