#include <new>
#include <vector>

#include "kernels/cpu/two_sweeps.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/optimizers_body.inl"
#include "kernels/cpu/for_each_isa.inl"

namespace batchops {
namespace {

double sum_of_squares(const OptimizerTensor* tensors, int64_t tensor_count, const Parallel& par) {
  constexpr int64_t kPart = 64 * 1024;
  std::vector<OptimizerChunk> chunks;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const OptimizerTensor& x = tensors[i];
    for (int64_t at = 0; at < x.numel; at += kPart) {
      chunks.push_back({&x, at, std::min(kPart, x.numel - at)});
    }
  }
  // Back to front, so that the gradients the step begins with are the last ones read.
  std::vector<double> sums(chunks.size());
  par(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) sums[i] = BATCHOPS_ISA_CALL(grad_sq, chunks[i]);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// What the gradients of this call are divided by.
template <class Args>
double divisor_of(const Args& args, double clip_eps, const double* grad_sum_sq,
                  const Parallel& par) {
  if (!(args.max_grad_norm > 0)) return args.grad_scale;
  const double sum_sq =
      grad_sum_sq ? *grad_sum_sq : sum_of_squares(args.tensors, args.tensor_count, par);
  return grad_divisor(sum_sq, args.max_grad_norm, clip_eps, args.grad_scale);
}

struct Lamb {
  using Sums = LambNorms;
  using Outcome = LambStepFactors;
  static constexpr int64_t kWhole = 96 * 1024;
  static constexpr bool kKeeps = true;  // the quotients

  Lamb(const LambArgs& args, double C, TensorStats* stats)
      : tensors(args.tensors),
        tensor_count(args.tensor_count),
        grad_scale(args.grad_scale),
        C(C),
        stats(stats),
        set_of(lamb_sets(args, sets)) {
    for (const LambSet& set : sets) factors.emplace_back(set, C);
  }

  void first(const OptimizerChunk& chunk, int32_t i, float* quotients, LambNorms& norms) const {
    const int32_t set = set_of[i];
    BATCHOPS_ISA_CALL(lamb_moments, chunk, factors[set], sets[set].caution != 0, quotients, norms);
  }
  LambStepFactors outcome(int32_t i, const LambNorms& norms) const {
    const LambOutcome outcome(sets[set_of[i]], norms, tensors[i].numel, C, grad_scale);
    if (stats != nullptr) stats[i] = outcome.stats;
    return outcome.step;
  }
  void second(const OptimizerChunk& chunk, int32_t i, const LambStepFactors& step,
              const float* quotients, const Ahead& ahead) const {
    const int32_t set = set_of[i];
    BATCHOPS_ISA_CALL(lamb_apply, chunk, factors[set], sets[set].caution != 0, step, quotients,
                      ahead);
  }

  const OptimizerTensor* tensors;
  int64_t tensor_count;
  double grad_scale, C;
  TensorStats* stats;
  std::vector<LambSet> sets;
  std::vector<LambFactors> factors;  // of each set
  std::vector<int32_t> set_of;
};

struct Lars {
  using Sums = LarsNorms;
  using Outcome = LarsFactors;
  static constexpr int64_t kWhole = 192 * 1024;
  static constexpr bool kKeeps = false;

  Lars(const LarsArgs& args, double C, TensorStats* stats)
      : tensors(args.tensors),
        tensor_count(args.tensor_count),
        args(args),
        C(C),
        divisor(C),
        stats(stats) {}

  void first(const OptimizerChunk& chunk, int32_t i, float*, LarsNorms& norms) const {
    const LarsGroup& group = args.groups[tensors[i].group];
    const double decay = group.decay_of(tensors[i].excluded != 0) * divisor.c;
    BATCHOPS_ISA_CALL(lars_norms, chunk, static_cast<float>(divisor.inverse),
                      static_cast<float>(group.maximize ? -decay : decay), norms);
  }
  LarsFactors outcome(int32_t i, const LarsNorms& norms) const {
    const OptimizerTensor& x = tensors[i];
    LarsOutcome outcome(args.groups[x.group], x, norms, C, args.grad_scale);
    outcome.keep_in_range();
    if (stats != nullptr) stats[i] = outcome.stats;
    return outcome.factors;
  }
  // Its second sweep waits for memory itself.
  void second(const OptimizerChunk& chunk, int32_t, const LarsFactors& factors, const float*,
              const Ahead&) const {
    BATCHOPS_ISA_CALL(lars_apply, chunk, factors);
  }

  const OptimizerTensor* tensors;
  int64_t tensor_count;
  const LarsArgs& args;
  double C;
  GradDivisor divisor;
  TensorStats* stats;
};

template <class Algorithm>
void run(const Algorithm& algorithm, const Parallel& par) {
  if (algorithm.stats != nullptr) {  // of tensors without elements too
    std::fill_n(algorithm.stats, algorithm.tensor_count, TensorStats{0, 0, 0, 1});
  }
  TwoSweeps<Algorithm>(algorithm, par).run();
}

constexpr const char* kNoMemory = "out of memory for the list of tasks";

}  // namespace

const char* grad_sum_sq_cpu(const OptimizerTensor* tensors, int64_t tensor_count, double* sum_sq,
                            const Parallel& par) {
  try {
    *sum_sq = sum_of_squares(tensors, tensor_count, par);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

const char* lamb_step_cpu(const LambArgs& args, const double* grad_sum_sq, TensorStats* stats,
                          const Parallel& par) {
  try {
    run(Lamb(args, divisor_of(args, args.clip_eps, grad_sum_sq, par), stats), par);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

const char* lars_step_cpu(const LarsArgs& args, const double* grad_sum_sq, TensorStats* stats,
                          const Parallel& par) {
  try {
    run(Lars(args, divisor_of(args, 0, grad_sum_sq, par), stats), par);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace batchops
