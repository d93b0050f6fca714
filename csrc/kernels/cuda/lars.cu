// LARS: first sweep Σ p², Σ g², Σ (g + λ·p)²; second sweep m and p. See optimizer_step.cuh.
#include "kernels/cuda/optimizer_step.cuh"
#include "kernels/lars_factors.h"

namespace batchops {
namespace cuda::optimizer {
inline namespace lars_cu {

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/lars_math.inl"
#undef BATCHOPS_OPTIMIZER_INLINE

// What tensors of a set have in common.
struct LarsSet {
  LarsGroup group;
  double step;
  int32_t excluded;

  LarsSet() = default;
  BATCHOPS_HOST_DEVICE LarsSet(const LarsGroup& of, double t, bool without_ratio)
      : group(of), step(t), excluded(without_ratio) {}
};

// The formulas of lars_math.inl, or in double: then m goes to p as it is before it is rounded.
template <bool kDoubles>
struct Formulas {
  using Moment = F;
  Constants c;

  BATCHOPS_DEVICE explicit Formulas(const LarsFactors& factors) : c(factors) {}
  BATCHOPS_DEVICE F buffer(F m, F g, F p) const { return lars_cu::buffer(m, g, p, c); }
  BATCHOPS_DEVICE F moved(F p, F m) const { return lars_cu::moved(p, m, c); }
  BATCHOPS_DEVICE F updated(F p, F g, F m) const { return lars_cu::updated(p, g, m, c); }
};
template <>
struct Formulas<true> {
  using Moment = double;
  double momentum, k_g, k_p, p_g, p_p, p_m;

  BATCHOPS_DEVICE explicit Formulas(const LarsFactors& f)
      : momentum(packed(f.momentum)),
        k_g(packed(f.k_g)),
        k_p(packed(f.k_p)),
        p_g(packed(f.p_g)),
        p_p(packed(f.p_p)),
        p_m(packed(f.p_m)) {}
  BATCHOPS_DEVICE double buffer(F m, F g, F p) const {
    return fma(momentum, wide(m), fma(k_g, wide(g), k_p * wide(p)));
  }
  BATCHOPS_DEVICE F moved(F p, double m) const { return rounded(fma(p_m, m, wide(p))); }
  BATCHOPS_DEVICE F updated(F p, F g, double m) const {
    return rounded(fma(p_m, m, fma(p_g, wide(g), fma(p_p, wide(p), wide(p)))));
  }
};

struct Lars {
  static constexpr int kSums = 3;   // of LarsNorms, in its order
  static constexpr int kStage = 1;  // m, of the second sweep; p and g have the slot
  static constexpr bool kFetchesSecond = true;
  static constexpr bool kGradAgain = true;
  using Group = LarsGroup;
  using Set = LarsSet;
  struct Outcome : LarsFactors {
    float g_again;  // what the second sweep scales g with beside g_scale
  };

  // Of the first sweep, which takes its sums of ±g / 2^e: see GradDivisor.
  struct Factors {
    float g_scale, decay;
    Factors() = default;
    BATCHOPS_DEVICE Factors(const LarsSet& set, double C) {
      const GradDivisor divisor(C);
      g_scale = static_cast<float>(set.group.maximize ? -divisor.inverse : divisor.inverse);
      decay = static_cast<float>(set.group.decay_of(set.excluded != 0) * divisor.c);
    }
  };

  static BATCHOPS_DEVICE LarsGroup with_rates(LarsGroup group, const double* rates) {
    group.lr = rates[0];
    group.momentum_factor = rates[1];
    return group;
  }

  static BATCHOPS_DEVICE Outcome outcome(const LarsSet& set, const double (&sums)[kSums], int64_t,
                                         double C, double grad_scale, TensorStats& stats) {
    OptimizerTensor tensor;
    tensor.step = set.step;
    tensor.excluded = set.excluded;
    LarsOutcome outcome(set.group, tensor, {sums[0], sums[1], sums[2]}, C, grad_scale);
    stats = outcome.stats;
    const float g_scale = outcome.factors.g_scale;
    // Doubles have room for every factor.
    const double again = kDoubles ? 1.0 : outcome.keep_in_range();
    Outcome f{outcome.factors, static_cast<float>(again)};
    f.g_scale = g_scale;
    pack_all(f.momentum, f.k_p, f.p_p, f.p_m);
    pack(f.k_g, outcome.k_g);
    pack(f.p_g, outcome.p_g);
    return f;
  }

  static BATCHOPS_DEVICE int sums(const Factors&) { return kSums; }
  static BATCHOPS_DEVICE bool typed(const Factors&) { return true; }
  static BATCHOPS_DEVICE constexpr bool typed_second(const Outcome&) { return true; }

  static BATCHOPS_DEVICE void fetch(const Part& x, const Units& units, const Slot& slot,
                                    const Slot&) {
    slot.start(0, x.p, x.p_dtype(), units, L2Policy(x.kept != 0));
    slot.start(1, x.g, x.g_dtype(), units, L2Policy(x.kept != 0));
  }
  static BATCHOPS_DEVICE void fetch_second(const Part& x, const Units& units, const Slot& stage) {
    if (x.m != nullptr) stage.start(0, x.m, DType::f32, units, L2Policy(true));
  }

  // Keeps p and the scaled g.
  template <class P, class G, int W, class From>
  static BATCHOPS_DEVICE void first(const Part& x, const Units& units, const Factors& factors,
                                    const From& from, const Slot& kept, double (&sums)[kSums]) {
    const DType p_dtype = x.p_dtype(), g_dtype = x.g_dtype();
    const Memory<P> p(x.p, p_dtype, units.begin);
    const Memory<G> g(x.g, g_dtype, units.begin);
    const F g_scale(factors.g_scale), decay(factors.decay);
    struct Nothing {};
    struct Rest {
      Unit<Held<P>, W> p;
      Unit<Held<G>, W> g;
    };
    for_each_first<std::is_same_v<P, Any>, W>(
        units, from, [](int32_t, int32_t) { return Nothing{}; },
        [&](int32_t i, int32_t n) {
          if constexpr (From::kIs) {
            return Rest{from.slot.template copied<P>(0, p_dtype, n),
                        from.slot.template copied<G>(1, g_dtype, n)};
          } else {
            return Rest{p.template load<W>(i), g.template load<W>(i)};
          }
        },
        [&](Nothing, const Rest& raw, int32_t, int32_t n) {
          float p_i[W], g_i[W];
          to_float<Held<P>, W>(raw.p, p_i);
          to_float<Held<G>, W>(raw.g, g_i);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const F g_j = F(g_i[j]) * g_scale;
            const double p_wide = p_i[j], g_wide = g_j.v, u_wide = fused(decay, F(p_i[j]), g_j).v;
            sums[0] = fma(p_wide, p_wide, sums[0]);
            sums[1] = fma(g_wide, g_wide, sums[1]);
            sums[2] = fma(u_wide, u_wide, sums[2]);
            g_i[j] = g_j.v;
          }
          kept.template keep<W>(units.kept + n * W, p_i, g_i);
        });
  }

  template <bool kKept, class P, class G, int W>
  static BATCHOPS_DEVICE void second(const Part& x, const Units& units, const Factors&,
                                     const Outcome& outcome, const Slot& slot, const Slot& stage) {
    const Memory<P> p(x.p, x.p_dtype(), units.begin);
    const Memory<G> g(x.g, x.g_dtype(), units.begin);
    const Memory<float> m(x.m, DType::f32, units.begin);
    const Formulas<kDoubles> formulas(outcome);
    const F g_scale(outcome.g_scale), g_again(outcome.g_again);
    const bool momentum = x.m != nullptr;
    // With momentum, unless it is nesterov's, the gradient does not go to p itself.
    const bool direct = !momentum || packed(outcome.p_g) != 0 || packed(outcome.p_p) != 0;
    struct Loaded {
      Unit<Held<P>, W> p;
      Unit<Held<G>, W> g;
      Unit<float, W> m;
    };
    for_each_unit(
        units,
        [&](int32_t i) {
          Loaded raw{};
          if constexpr (!kKept) {
            raw.p = p.template load<W>(i, Once{});
            raw.g = g.template load<W>(i, Once{});
          }
          if constexpr (kKept && W == kWidth) {
            if (momentum && stage.floats != nullptr) {
              const auto before = static_cast<unsigned>(i - units.thread);
              raw.m = stage.copied<float>(0, DType::f32, before / kThreads * W);
              return raw;
            }
          }
          if (momentum) raw.m = m.load<W>(i, Once{});
          return raw;
        },
        [&](const Loaded& raw, int32_t i, int32_t n) {
          float p_i[W], g_i[W], m_i[W];
          if constexpr (kKept) {
            slot.fetch<W>(units.kept + n * W, p_i, g_i);
          } else {
            to_float<Held<P>, W>(raw.p, p_i);
            to_float<Held<G>, W>(raw.g, g_i);
#pragma unroll
            for (int j = 0; j < W; ++j) g_i[j] = (F(g_i[j]) * g_scale).v;
          }
          if constexpr (!kDoubles) {
#pragma unroll
            for (int j = 0; j < W; ++j) g_i[j] = (F(g_i[j]) * g_again).v;
          }
          to_float<float, W>(raw.m, m_i);
          // m as p takes it.
          typename Formulas<kDoubles>::Moment moment[W] = {};
          if (momentum) {
#pragma unroll
            for (int j = 0; j < W; ++j) {
              moment[j] = formulas.buffer(F(m_i[j]), F(g_i[j]), F(p_i[j]));
              m_i[j] = rounded(moment[j]).v;
            }
            m.store<W>(i, m_i, Once{});
          }
          if (direct) {
#pragma unroll
            for (int j = 0; j < W; ++j) {
              p_i[j] = formulas.updated(F(p_i[j]), F(g_i[j]), moment[j]).v;
            }
          } else {
#pragma unroll
            for (int j = 0; j < W; ++j) p_i[j] = formulas.moved(F(p_i[j]), moment[j]).v;
          }
          p.template store<W>(i, p_i, Once{});
          publish<P, W>(x, units.begin, i, p_i);
        });
  }
};

__global__ void __launch_bounds__(kBlock, kResident)
    lars_step(const __grid_constant__ StepArguments<Lars> args) {
  BATCHOPS_DYNAMIC_SHARED(memory, float);
  Step<Lars>(args, memory).run();
}

__global__ void __launch_bounds__(kMaxSets)
    lars_store_sets(const __grid_constant__ SetsToStore<LarsSet> args) {
  store_sets(args);
}

__global__ void __launch_bounds__(kMaxSets)
    lars_make_sets(const __grid_constant__ SetsToMake<Lars> args) {
  make_sets(args);
}

}  // namespace lars_cu
}  // namespace cuda::optimizer

using namespace cuda::optimizer;

size_t lars_workspace_bytes_cuda(const LarsArgs& args) {
  return StepPlan<Lars>(args, nullptr, nullptr).bytes;
}

const char* lars_step_cuda(const LarsArgs& args, const void* table, void* workspace,
                           const double* grad_sum_sq, TensorStats* stats, int device,
                           void* stream) {
  if (const char* error = cuda::use_device("lars", device)) return error;
  StepPlan<Lars> plan(args, table, workspace);
  plan.args.grad_sum_sq = grad_sum_sq;
  plan.args.stats = stats;
  return launch_step({"lars_step", lars_step, "lars_store_sets", lars_store_sets, "lars_make_sets",
                      lars_make_sets},
                     plan, device, stream);
}

}  // namespace batchops
