// LAMB: first sweep m and v, Σ p², Σ u²; second sweep p. See optimizer_step.cuh.
#include "kernels/cuda/optimizer_step.cuh"
#include "kernels/lamb_factors.h"

namespace batchops {
namespace cuda::optimizer {
inline namespace lamb_cu {

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/lamb_math.inl"
#undef BATCHOPS_OPTIMIZER_INLINE

struct Lamb {
  static constexpr int kSums = 5;   // of LambNorms, in its order
  static constexpr int kStage = 2;  // g and v; p and m have the slot
  static constexpr bool kFetchesSecond = false;
  static constexpr bool kGradAgain = false;
  using Group = LambGroup;
  using Set = LambSet;
  struct Factors : LambFactors {
    bool caution, apart, inside;
    Factors() = default;
    BATCHOPS_DEVICE Factors(const LambSet& set, double C)
        : LambFactors(set, C),
          caution(set.caution != 0),
          apart(is_apart(set)),
          inside(eps_inside[0] != 0) {
      pack_all(beta1, k1, weight_decay);
    }
  };
  struct Outcome : LambStepFactors {
    int32_t apart;
  };

  // λ·p joins the quotient in the update only: what caution multiplies that with, the norms tell.
  static BATCHOPS_DEVICE bool is_apart(const LambSet& set) {
    return set.caution != 0 && set.weight_decay != 0;
  }

  static BATCHOPS_DEVICE LambGroup with_rates(LambGroup group, const double* rates) {
    group.lr = rates[0];
    group.decay_lr = rates[1];
    return group;
  }

  static BATCHOPS_DEVICE Outcome outcome(const LambSet& set, const double (&sums)[kSums],
                                         int64_t numel, double C, double grad_scale,
                                         TensorStats& stats) {
    const LambNorms norms{sums[0], sums[1], sums[2], sums[3], sums[4]};
    const bool apart = is_apart(set);
    LambSet rest = set;
    if (!apart) rest.weight_decay = 0;  // it is in u
    const LambOutcome outcome(rest, norms, numel, C, grad_scale);
    stats = outcome.stats;
    Outcome packed_too{outcome.step, apart};
    pack_all(packed_too.step, packed_too.keep);
    return packed_too;
  }

  // The last two are caution's.
  static BATCHOPS_DEVICE int sums(const Factors& factors) { return factors.caution ? kSums : 3; }
  // Without what is rare: typed code is there for every pair of types.
  static BATCHOPS_DEVICE bool typed(const Factors& factors) {
    return !factors.caution && !factors.inside;
  }
  static BATCHOPS_DEVICE bool typed_second(const Outcome& outcome) { return outcome.apart == 0; }

  static BATCHOPS_DEVICE void fetch(const Part& x, const Units& units, const Slot& slot,
                                    const Slot& stage) {
    const L2Policy once(true), policy(x.kept != 0);
    slot.start(0, x.p, x.p_dtype(), units, policy);
    stage.start(0, x.g, x.g_dtype(), units, once);
    slot.start(1, x.m, DType::f32, units, policy);
    stage.start(1, x.v, DType::f32, units, policy);
  }
  static BATCHOPS_DEVICE void fetch_second(const Part&, const Units&, const Slot&) {}

  // Keeps p and u, rounded once; or, apart, the quotient's two parts.
  template <class P, class G, int W, class From>
  static BATCHOPS_DEVICE void first(const Part& x, const Units& units, const Factors& factors,
                                    const From& from, const Slot& kept, double (&sums)[kSums]) {
    constexpr bool kTyped = !std::is_same_v<P, Any>;
    const DType p_dtype = x.p_dtype(), g_dtype = x.g_dtype();
    const Memory<P> p(x.p, p_dtype, units.begin);
    const Memory<G> g(x.g, g_dtype, units.begin);
    const Memory<float> m(x.m, DType::f32, units.begin), v(x.v, DType::f32, units.begin);
    const bool caution = !kTyped && factors.caution, apart = !kTyped && factors.apart;
    Coefficients c(factors);
    if constexpr (kTyped) c.inside = false;
    const L2Policy policy = kept.policy();
    struct Staged {
      Unit<Held<G>, W> g;
      Unit<float, W> v;
    };
    struct Rest {
      Unit<Held<P>, W> p;
      Unit<float, W> m;
    };
    for_each_first<!kTyped, W>(
        units, from,
        [&](int32_t i, int32_t n) {
          if constexpr (From::kIs) {
            return Staged{from.stage.template copied<G>(0, g_dtype, n),
                          from.stage.template copied<float>(1, DType::f32, n)};
          } else {
            return Staged{g.template load<W>(i), v.load<W>(i)};
          }
        },
        [&](int32_t i, int32_t n) {
          if constexpr (From::kIs) {
            return Rest{from.slot.template copied<P>(0, p_dtype, n),
                        from.slot.template copied<float>(1, DType::f32, n)};
          } else {
            return Rest{p.template load<W>(i), m.load<W>(i)};
          }
        },
        [&](const Staged& staged, const Rest& rest, int32_t i, int32_t n) {
          float p_i[W], g_i[W], m_i[W], v_i[W], u_i[W];
          to_float<Held<P>, W>(rest.p, p_i);
          to_float<Held<G>, W>(staged.g, g_i);
          to_float<float, W>(rest.m, m_i);
          to_float<float, W>(staged.v, v_i);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const F g_j = F(g_i[j]) * c.g_scale;
            const F m_j = moment(F(m_i[j]), g_j, c);
            const F v_j = second_moment(F(v_i[j]), g_j, c);
            const Direction u_j = direction(m_j, v_j, g_j, F(p_i[j]), caution, apart, c);
            const double p_wide = p_i[j], g_wide = g_j.v;
            sums[0] = fma(p_wide, p_wide, sums[0]);
            sums[1] = fma(g_wide, g_wide, sums[1]);
            sums[2] = fma(u_j.wide, u_j.wide, sums[2]);
            if (apart) sums[3] = fma(u_j.wide, p_wide, sums[3]);
            if (caution) sums[4] += where_positive(agreement(m_j, g_j), F(1.0f)).v;
            m_i[j] = m_j.v;
            v_i[j] = v_j.v;
            if (apart) p_i[j] = u_j.parts.high.v;
            u_i[j] = (apart ? u_j.parts.low : u_j.rounded).v;
          }
          m.store<W>(i, m_i, policy);
          v.store<W>(i, v_i, policy);
          const int32_t place = units.kept + n * W;
          // The copy of p is where it would be kept.
          if (!From::kIs || !std::is_same_v<P, float>) kept.template keep<0, W>(place, p_i);
          kept.template keep<1, W>(place, u_i);
        });
  }

  template <bool kKept, class P, class G, int W>
  static BATCHOPS_DEVICE void second(const Part& x, const Units& units, const Factors& factors,
                                     const Outcome& outcome, const Slot& slot, const Slot&) {
    const Update update(outcome);
    const bool apart = std::is_same_v<P, Any> && outcome.apart != 0;
    const Memory<P> p(x.p, x.p_dtype(), units.begin);
    const Memory<float> m(x.m, DType::f32, units.begin), v(x.v, DType::f32, units.begin);
    struct Loaded {
      Unit<Held<P>, W> p;
      Unit<float, W> m, v;
    };
    for_each_unit(
        units,
        [&](int32_t i) {
          Loaded raw{};
          if (!kKept || apart) raw.p = p.template load<W>(i, Once{});
          if constexpr (!kKept) {
            raw.m = m.load<W>(i, Once{});
            raw.v = v.load<W>(i, Once{});
          }
          return raw;
        },
        [&](const Loaded& raw, int32_t i, int32_t n) {
          float p_i[W], high[W], low[W] = {};
          if constexpr (kKept) {
            if (apart) {
              to_float<Held<P>, W>(raw.p, p_i);
              slot.fetch<W>(units.kept + n * W, high, low);
            } else {
              slot.fetch<W>(units.kept + n * W, p_i, high);
            }
          } else {
            to_float<Held<P>, W>(raw.p, p_i);
            again<W>(x, units.begin + i * W, raw.m, raw.v, p_i, factors, high, low);
          }
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const F p_j(p_i[j]), u_j(high[j]);
            p_i[j] = (apart ? update(p_j, {u_j, F(low[j])}) : update(p_j, u_j)).v;
          }
          p.template store<W>(i, p_i, Once{});
          publish<P, W>(x, units.begin, i, p_i);
        });
  }

 private:
  struct Coefficients : Constants {
    double beta1_wide, k1_wide, weight_decay_wide;
    BATCHOPS_DEVICE explicit Coefficients(const Factors& factors)
        : Constants(factors),
          beta1_wide(packed(factors.beta1)),
          k1_wide(packed(factors.k1)),
          weight_decay_wide(packed(factors.weight_decay)) {}
  };
  static BATCHOPS_DEVICE F moment(F m, F g, const Coefficients& c) {
    if constexpr (kDoubles) return rounded(fma(c.beta1_wide, wide(m), c.k1_wide * wide(g)));
    return first_moment(m, g, c);
  }

  // u / scale or, apart, the quotient that is yet to become it.
  struct Direction {
    Quotient parts;
    F rounded;    // but for apart
    double wide;  // before it is rounded
  };
  static BATCHOPS_DEVICE Direction direction(F m, F v, F g, F p, bool caution, bool apart,
                                             const Coefficients& c) {
    Quotient q = quotient(m, v, c);
    if (caution) {
      const F agree = agreement(m, g);
      q = {where_positive(agree, q.high), where_positive(agree, q.low)};
    }
    if (!apart && !kDoubles) q = with_decay(q, p, c);
    const double u = wide(q.high) - wide(q.low);
    if (apart || !kDoubles) return {q, q.high - q.low, u};
    const double decayed = fma(c.weight_decay_wide, wide(p), u);
    return {q, rounded(decayed), decayed};
  }

  // The second sweep's part, of u or, apart, of the quotient.
  struct Update : StepConstants {
    double step_wide, keep_wide;
    BATCHOPS_DEVICE explicit Update(const Outcome& outcome)
        : StepConstants(outcome),
          step_wide(packed(outcome.step)),
          keep_wide(packed(outcome.keep)) {}
    BATCHOPS_DEVICE F operator()(F p, F u) const {
      if constexpr (kDoubles) return moved(p, wide(u));
      return updated(p, u, *this);
    }
    BATCHOPS_DEVICE F operator()(F p, const Quotient& q) const {
      if constexpr (kDoubles) return moved(p, wide(q.high) - wide(q.low));
      return updated(p, q, *this);
    }
    BATCHOPS_DEVICE F moved(F p, double u) const {
      return rounded(fma(-step_wide, u, keep_wide * wide(p)));
    }
  };

  // What a slot would have kept, from what the first sweep has stored.
  template <int W>
  static BATCHOPS_DEVICE void again(const Part& x, int32_t at, const Unit<float, W>& m,
                                    const Unit<float, W>& v, const float (&p)[W],
                                    const Factors& factors, float (&high)[W], float (&low)[W]) {
    const Coefficients c(factors);
    float m_i[W], v_i[W];
    to_float<float, W>(m, m_i);
    to_float<float, W>(v, v_i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      F g_j(0.0f);
      if (factors.caution) {
        // Rare enough for loads of single elements.
        g_j = F(load_as_float(x.g, x.g_dtype(), at + j)) * c.g_scale;
      }
      const Direction u_j =
          direction(F(m_i[j]), F(v_i[j]), g_j, F(p[j]), factors.caution, factors.apart, c);
      high[j] = (factors.apart ? u_j.parts.high : u_j.rounded).v;
      if (factors.apart) low[j] = u_j.parts.low.v;
    }
  }
};

__global__ void __launch_bounds__(kBlock, kResident)
    lamb_step(const __grid_constant__ StepArguments<Lamb> args) {
  BATCHOPS_DYNAMIC_SHARED(memory, float);
  Step<Lamb>(args, memory).run();
}

__global__ void __launch_bounds__(kMaxSets)
    lamb_store_sets(const __grid_constant__ SetsToStore<LambSet> args) {
  store_sets(args);
}

__global__ void __launch_bounds__(kMaxSets)
    lamb_make_sets(const __grid_constant__ SetsToMake<Lamb> args) {
  make_sets(args);
}

}  // namespace lamb_cu
}  // namespace cuda::optimizer

using namespace cuda::optimizer;

size_t lamb_workspace_bytes_cuda(const LambArgs& args) {
  return StepPlan<Lamb>(args, nullptr, nullptr).bytes;
}

const char* lamb_step_cuda(const LambArgs& args, const void* table, void* workspace,
                           const double* grad_sum_sq, TensorStats* stats, int device,
                           void* stream) {
  if (const char* error = cuda::use_device("lamb", device)) return error;
  StepPlan<Lamb> plan(args, table, workspace);
  plan.args.clip_eps = args.clip_eps;
  plan.args.grad_sum_sq = grad_sum_sq;
  plan.args.stats = stats;
  return launch_step({"lamb_step", lamb_step, "lamb_store_sets", lamb_store_sets, "lamb_make_sets",
                      lamb_make_sets},
                     plan, device, stream);
}

}  // namespace batchops
