// LAMB: first sweep m and v, Σ p², Σ u²; second sweep p. See optimizer_step.cuh.
#include "kernels/cuda/optimizer_step.cuh"
#include "kernels/lamb_factors.h"

namespace batchops {
namespace cuda::optimizer {
namespace {

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/lamb_math.inl"
#undef BATCHOPS_OPTIMIZER_INLINE

// m / (sqrt(v) + eps·b), rounded once: what is kept on the chip must not differ from what is formed
// again from m and v, and half a unit in the last place of it is as good as none in p.
BATCHOPS_DEVICE F rounded_quotient(F m, F v, const Constants& c) {
  const Quotient q = quotient(m, v, c);
  return q.high - q.low;
}

struct Lamb {
  static constexpr int kSums = 5;  // of LambNorms, in its order
  using Group = LambGroup;
  using Set = LambSet;
  using Outcome = LambStepFactors;
  struct Factors : LambFactors {
    int32_t caution;
    Factors() = default;
    BATCHOPS_DEVICE Factors(const LambSet& set, double C)
        : LambFactors(set, C), caution(set.caution) {}
  };

  static BATCHOPS_DEVICE LambGroup with_rates(LambGroup group, const double* rates) {
    group.lr = rates[0];
    group.decay_lr = rates[1];
    return group;
  }

  static BATCHOPS_DEVICE Outcome outcome(const LambSet& set, const double (&sums)[kSums],
                                         int64_t numel, double C, double grad_scale,
                                         TensorStats& stats) {
    const LambNorms norms{sums[0], sums[1], sums[2], sums[3], sums[4]};
    const LambOutcome outcome(set, norms, numel, C, grad_scale);
    stats = outcome.stats;
    return outcome.step;
  }

  // Keeps p and the quotient.
  static BATCHOPS_DEVICE void first(const Part& part, const Factors& factors, const Slot& slot,
                                    double (&sums)[kSums]) {
    with_units<true>(part, [&](auto p, auto g, auto width, const Units& units) {
      constexpr int W = decltype(width)::value;
      first<typename decltype(p)::type, typename decltype(g)::type, W>(part.x, units, factors, slot,
                                                                       sums);
    });
  }

  template <bool kKept>
  static BATCHOPS_DEVICE void second(const Part& part, const Factors& factors,
                                     const Outcome& outcome, const Slot& slot) {
    const StepConstants step(outcome);
    with_units<false>(part, [&](auto p, auto, auto width, const Units& units) {
      constexpr int W = decltype(width)::value;
      second<kKept, typename decltype(p)::type, W>(part.x, units, factors, step, slot);
    });
  }

 private:
  template <class P, class G, int W>
  static BATCHOPS_DEVICE void first(const Entry& x, const Units& units, const Factors& factors,
                                    const Slot& slot, double (&sums)[kSums]) {
    const Memory<P> p(x.exact(), x.exact_dtype(), units.begin);
    const Memory<G> g(x.g, static_cast<DType>(x.g_dtype), units.begin);
    const Memory<float> m(x.m, DType::f32, units.begin), v(x.v, DType::f32, units.begin);
    const bool caution = factors.caution != 0;
    const Constants c(factors);
    struct Loaded {
      Unit<Held<P>, W> p;
      Unit<Held<G>, W> g;
      Unit<float, W> m, v;
    };
    for_each_unit(
        units,
        [&](int32_t i) {
          return Loaded{p.template load<W>(i), g.template load<W>(i), m.load<W>(i), v.load<W>(i)};
        },
        [&](const Loaded& raw, int32_t i, int32_t n) {
          float p_i[W], g_i[W], m_i[W], v_i[W], q_i[W];
          to_float<Held<P>, W>(raw.p, p_i);
          to_float<Held<G>, W>(raw.g, g_i);
          to_float<float, W>(raw.m, m_i);
          to_float<float, W>(raw.v, v_i);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const F g_j = F(g_i[j]) * c.g_scale;
            const F m_j = first_moment(F(m_i[j]), g_j, c);
            const F v_j = second_moment(F(v_i[j]), g_j, c);
            F q_j = rounded_quotient(m_j, v_j, c), u_j = q_j;
            const double p_wide = p_i[j], g_wide = g_j.v;
            if (caution) {
              const F agree = agreement(m_j, g_j);
              u_j = q_j = where_positive(agree, q_j);
              sums[3] = fma(static_cast<double>(q_j.v), p_wide, sums[3]);
              sums[4] += where_positive(agree, F(1.0f)).v;
            } else {
              u_j = fused(c.weight_decay, F(p_i[j]), q_j);
            }
            const double u_wide = u_j.v;
            sums[0] = fma(p_wide, p_wide, sums[0]);
            sums[1] = fma(g_wide, g_wide, sums[1]);
            sums[2] = fma(u_wide, u_wide, sums[2]);
            m_i[j] = m_j.v;
            v_i[j] = v_j.v;
            q_i[j] = q_j.v;
          }
          m.store<W>(i, m_i);
          v.store<W>(i, v_i);
          slot.keep<W>(units.kept + n * W, p_i, q_i);
        });
  }

  template <bool kKept, class P, int W>
  static BATCHOPS_DEVICE void second(const Entry& x, const Units& units, const Factors& factors,
                                     const StepConstants& step, const Slot& slot) {
    const Memory<P> p(x.exact(), x.exact_dtype(), units.begin);
    const Memory<float> m(x.m, DType::f32, units.begin), v(x.v, DType::f32, units.begin);
    struct Loaded {
      Unit<Held<P>, W> p;
      Unit<float, W> m, v;
    };
    for_each_unit(
        units,
        [&](int32_t i) {
          if constexpr (kKept) return Loaded{};
          return Loaded{p.template load<W>(i), m.load<W>(i), v.load<W>(i)};
        },
        [&](const Loaded& raw, int32_t i, int32_t n) {
          float p_i[W], q_i[W];
          if constexpr (kKept) {
            slot.fetch<W>(units.kept + n * W, p_i, q_i);
          } else {
            to_float<Held<P>, W>(raw.p, p_i);
            again<W>(x, units.begin + i * W, raw.m, raw.v, factors, q_i);
          }
#pragma unroll
          for (int j = 0; j < W; ++j) {
            p_i[j] = updated(F(p_i[j]), {F(q_i[j]), F(0.0f)}, step).v;
          }
          p.template store<W>(i, p_i);
          if (x.master != nullptr) publish<P, W>(x, units.begin, i, p_i);
        });
  }

  // The quotients once more, from what the first sweep has stored.
  template <int W>
  static BATCHOPS_DEVICE void again(const Entry& x, int64_t at, const Unit<float, W>& m,
                                    const Unit<float, W>& v, const Factors& factors,
                                    float (&q)[W]) {
    const Constants c(factors);
    float m_i[W], v_i[W];
    to_float<float, W>(m, m_i);
    to_float<float, W>(v, v_i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      F q_j = rounded_quotient(F(m_i[j]), F(v_i[j]), c);
      if (factors.caution) {
        // Rare enough for loads of single elements.
        const F g_j(load_as_float(x.g, static_cast<DType>(x.g_dtype), at + j));
        q_j = where_positive(agreement(F(m_i[j]), g_j * c.g_scale), q_j);
      }
      q[j] = q_j.v;
    }
  }
};

__global__ void __launch_bounds__(kThreads, kResident)
    lamb_step(const __grid_constant__ StepArguments<Lamb> args) {
  BATCHOPS_DYNAMIC_SHARED(slots, float);
  Step<Lamb>(args, slots).run();
}

__global__ void __launch_bounds__(kMaxSets)
    lamb_store_sets(const __grid_constant__ SetsToStore<LambSet> args) {
  store_sets(args);
}

__global__ void __launch_bounds__(kMaxSets)
    lamb_make_sets(const __grid_constant__ SetsToMake<Lamb> args) {
  make_sets(args);
}

}  // namespace
}  // namespace cuda::optimizer

using namespace cuda::optimizer;

size_t lamb_workspace_bytes_cuda(const LambArgs& args) {
  return StepPlan<Lamb>(args, nullptr, nullptr).bytes;
}

const char* lamb_step_cuda(const LambArgs& args, const void* table, void* workspace,
                           const double* grad_sum_sq, TensorStats* stats, int device,
                           void* stream) {
  if (const char* error = cuda::set_device("lamb", device)) return error;
  StepPlan<Lamb> plan(args, table, workspace);
  plan.args.clip_eps = args.clip_eps;
  plan.args.grad_sum_sq = grad_sum_sq;
  plan.args.stats = stats;
  return launch_step({"lamb_step", lamb_step, "lamb_store_sets", lamb_store_sets, "lamb_make_sets",
                      lamb_make_sets},
                     plan, device, stream);
}

}  // namespace batchops
