// LAMB and LARS on one chunk of one tensor. Compile with -ffp-contract=off: see compensated.inl.

using F = Vec<float>;
using D = Vec<double>;
constexpr int64_t kLanes = F::kLanes;

// a·b + c, rounded once.
BATCHOPS_INLINE F fused(F a, F b, F c) {
#if defined(BATCHOPS_ISA_AVX512) || defined(BATCHOPS_ISA_AVX2) || defined(__aarch64__)
  return fma(a, b, c);
#else
  // Without FMA: in double the product is exact, and the sum's rounding there hardly ever matters.
  F result;
  for (int i = 0; i < F::kLanes; ++i) {
    result.v[i] = static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]);
  }
  return result;
#endif
}

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_INLINE
#include "kernels/compensated.inl"
namespace lamb {
#include "kernels/lamb_math.inl"
}
namespace lars {
#include "kernels/lars_math.inl"
}
#undef BATCHOPS_OPTIMIZER_INLINE

// Σ x² in lanes of float, moved to double before they have grown long; and in double throughout
// where float's range would not do.
struct Squares {
  F lanes;
  D low, high;

  BATCHOPS_INLINE Squares() : lanes(0.0f), low(0.0), high(0.0) {}
  BATCHOPS_INLINE void add(F x) { lanes = fma(x, x, lanes); }
  BATCHOPS_INLINE void add_wide(F x) {
    D a, b;
    widen(x, a, b);
    low = fma(a, a, low);
    high = fma(b, b, high);
  }
  BATCHOPS_INLINE void flush() {
    D a, b;
    widen(lanes, a, b);
    low = low + a;
    high = high + b;
    lanes = F(0.0f);
  }
  BATCHOPS_INLINE double total() {
    flush();
    return sum(low + high);
  }
  // Whether one lane, and so perhaps one element, has most of the total.
  BATCHOPS_INLINE bool uneven(double total) const {
    double lanes[D::kLanes];
    store(lanes, max(low, high));
    return *std::max_element(lanes, lanes + D::kLanes) > total / 2;
  }
};
// Squares below the smallest normal float lose places, those above the largest overflow. A chunk's
// sum inside these bounds has lost less than 1e-7 of itself; outside (or NaN) it is formed anew.
BATCHOPS_INLINE bool in_float_range(double sum_sq) { return sum_sq > 1e-26 && sum_sq < 1e38; }

constexpr int64_t kFlushEvery = 16;  // vectors

template <class... S>
BATCHOPS_INLINE void prefetch_ahead(int64_t i, const S*... arrays) {
  (prefetch(arrays, i + kAhead<S>), ...);
}

// Vectors of float in a line of the cache.
constexpr int kLine = std::max(64 / kVecBytes, 1);

// line(i, n, vectors): `vectors` of them, an integral constant, from element i on; n = kLanes but
// for the last one of a run, which is alone then. ask(i) comes before those of a full line.
template <class Ask, class Line>
BATCHOPS_INLINE void for_each_line(int64_t count, Ask&& ask, Line&& line) {
  constexpr int64_t kWide = kLine * kLanes;
  constexpr std::integral_constant<int, 1> kOne;
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    ask(i);
    line(i, kLanes, std::integral_constant<int, kLine>{});
  }
  for (; i + kLanes <= count; i += kLanes) line(i, kLanes, kOne);
  if (i < count) line(i, count - i, kOne);
}

// step(i, n): elements [i, i + n), n = kLanes but for the last one; flush() every few steps.
template <class Ask, class Step, class Flush>
BATCHOPS_INLINE void for_each_vector(int64_t count, Ask&& ask, Step&& step, Flush&& flush) {
  constexpr int64_t kRun = kFlushEvery * kLanes;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t size = std::min(count - begin, kRun);
    for_each_line(
        size, [&](int64_t i) BATCHOPS_INLINE_LAMBDA { ask(begin + i); },
        [&](int64_t i, int64_t n, auto vectors) BATCHOPS_INLINE_LAMBDA {
          for (int k = 0; k < decltype(vectors)::value; ++k) step(begin + i + k * kLanes, n);
        });
    flush();
  }
}

template <class S>
BATCHOPS_INLINE F load_part(const S* x, int64_t n) {
  return n == kLanes ? load<float>(x) : load<float>(x, n);
}
template <class S>
BATCHOPS_INLINE void store_part(S* x, F value, int64_t n) {
  if (n == kLanes) {
    store(x, value);
  } else {
    store(x, value, n);
  }
}
// Lanes past n hold what the formulas make of zeros, NaN with eps = 0: out of the sums with them.
BATCHOPS_INLINE F only_part(F x, int64_t n) {
  return n == kLanes ? x : keep((uint64_t{1} << n) - 1, x);
}

template <class G>
double squares_of(const G* g, int64_t count) {
  Squares squares[4];
  // Four streams: from memory a core reads those faster than one.
  const int64_t quarter = count / (4 * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int k = 0; k < 4; ++k) squares[k].add_wide(load<float>(g + k * quarter + i));
  }
  for (int64_t i = 4 * quarter; i < count; i += kLanes) {
    squares[0].add_wide(load_part(g + i, std::min(kLanes, count - i)));
  }
  return (squares[0].total() + squares[1].total()) + (squares[2].total() + squares[3].total());
}

// f(T*) with the element type of `dtype`.
template <class F_>
BATCHOPS_INLINE auto with_element(DType dtype, F_&& f) {
  return dtype == DType::f16    ? f(static_cast<Half*>(nullptr))
         : dtype == DType::bf16 ? f(static_cast<BFloat16*>(nullptr))
                                : f(static_cast<float*>(nullptr));
}

// f(p, g) with the chunk's parameter, the master where there is one, and gradient.
template <class F_>
BATCHOPS_INLINE void with_parameter_and_gradient(const OptimizerChunk& chunk, F_&& f) {
  const OptimizerTensor& x = *chunk.tensor;
  with_element(x.master ? DType::f32 : x.p_dtype, [&](auto* p_type) {
    with_element(x.g_dtype, [&](auto* g_type) {
      auto* p = static_cast<decltype(p_type)>(x.master ? x.master : x.p);
      f(p + chunk.begin,
        static_cast<const std::remove_pointer_t<decltype(g_type)>*>(x.g) + chunk.begin);
    });
  });
}

// The low-precision copy of a master that has changed.
BATCHOPS_NOINLINE void publish(const OptimizerChunk& chunk) {
  const OptimizerTensor& x = *chunk.tensor;
  with_element(x.p_dtype, [&](auto* type) {
    auto* p = static_cast<decltype(type)>(x.p) + chunk.begin;
    for (int64_t i = 0; i < chunk.count; i += kLanes) {
      const int64_t n = std::min(kLanes, chunk.count - i);
      store_part(p + i, load_part(x.master + chunk.begin + i, n), n);
    }
  });
}

double grad_sq(const OptimizerChunk& chunk) {
  return with_element(chunk.tensor->g_dtype, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    return squares_of(static_cast<const G*>(chunk.tensor->g) + chunk.begin, chunk.count);
  });
}

// Where every change is small beside its p, plain float does: what at an eighth of |p| is lost in
// the change comes to less than one of p's last place.
BATCHOPS_INLINE bool small_beside(F change, F p) {
  return positive_bits(F(8.0f) * abs(change) - abs(p)) == 0;
}

// ---------------------------------------------------------------------------------------- LAMB

// Of fewer elements, or where one has most of the norm, the errors do not average out.
constexpr int64_t kFew = 64;

// The sums once more from what is stored, where float did not do, and always with caution.
template <class P, class G>
void norms_in_double(const P* p, const G* g, const float* m, const float* v, int64_t count,
                     const lamb::Constants& c, bool caution, LambNorms& norms) {
  Squares p_sq, g_sq, u_sq;
  D cross(0.0), kept(0.0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    const F p_i = load_part(p + i, n), m_i = load_part(m + i, n);
    const F g_i = load_part(g + i, n) * c.g_scale;
    lamb::Quotient q = lamb::quotient(m_i, load_part(v + i, n), c);
    p_sq.add_wide(p_i);
    g_sq.add_wide(g_i);
    if (!caution) q = lamb::with_decay(q, p_i, c);
    F u = only_part(q.high - q.low, n);
    if (caution) {
      const F agreement = lamb::agreement(m_i, g_i);
      u = lamb::where_positive(agreement, u);
      D a, b, u_low, u_high;
      widen(p_i, a, b);
      widen(u, u_low, u_high);
      cross = fma(a, u_low, fma(b, u_high, cross));
      widen(only_part(lamb::where_positive(agreement, F(1.0f)), n), a, b);
      kept = kept + (a + b);
    }
    u_sq.add_wide(u);
  }
  norms.p_sq += p_sq.total();
  norms.g_sq += g_sq.total();
  norms.u_sq += u_sq.total();
  norms.cross += sum(cross);
  norms.kept += sum(kept);
}

template <class P, class G>
void moments(const P* p, const G* g, float* m, float* v, int64_t count, const LambFactors& factors,
             bool caution, float* quotients, LambNorms& norms) {
  const lamb::Constants c(factors);
  Squares p_sq, g_sq, u_sq;
  for_each_vector(
      count, [&](int64_t i) BATCHOPS_INLINE_LAMBDA { prefetch_ahead(i, p, g, m, v); },
      [&](int64_t i, int64_t n) BATCHOPS_INLINE_LAMBDA {
        const F g_i = load_part(g + i, n) * c.g_scale;
        const F m_i = lamb::first_moment(load_part(m + i, n), g_i, c);
        const F v_i = lamb::second_moment(load_part(v + i, n), g_i, c);
        store_part(m + i, m_i, n);
        store_part(v + i, v_i, n);
        const F p_i = load_part(p + i, n);
        const F q = lamb::rough_quotient(m_i, v_i, c);
        if (quotients != nullptr) store(quotients + i, q);
        const F u = fused(c.weight_decay.high, p_i, q);
        p_sq.add(p_i);
        g_sq.add(g_i);
        u_sq.add(only_part(u, n));
      },
      [&]() BATCHOPS_INLINE_LAMBDA {
        p_sq.flush();
        g_sq.flush();
        u_sq.flush();
      });
  const double p_total = p_sq.total(), g_total = g_sq.total(), u_total = u_sq.total();
  const bool in_range =
      in_float_range(p_total) && in_float_range(g_total) && in_float_range(u_total);
  // Where λ·p and the quotient all but cancel in most elements, u's norm has their rounding errors,
  // as many times larger as the norms of the two are. Decay alone, without a gradient, has 1.
  constexpr double kCancels = 2;
  const double decay_total = double{factors.weight_decay[0]} * factors.weight_decay[0] * p_total;
  const bool cancels = decay_total > kCancels * kCancels * u_total;
  if (caution || count < kFew || !in_range || cancels || u_sq.uneven(u_total)) {
    return norms_in_double(p, g, m, v, count, c, caution, norms);
  }
  norms.p_sq += p_total;
  norms.g_sq += g_total;
  norms.u_sq += u_total;
}

template <bool kCaution, bool kKept, class P, class G>
BATCHOPS_INLINE void apply(P* p, const G* g, const float* m, const float* v, int64_t count,
                           const LambFactors& factors, const LambStepFactors& step_factors,
                           const float* quotients, Ahead ahead) {
  const lamb::Constants c(factors);
  const lamb::StepConstants step(step_factors);
  // Where decay is not little, what makes a small change may be large: then none counts as small.
  const bool little_decay = std::abs(1 - step_factors.keep[0]) < 1.0f / 32;
  const F decay = little_decay ? (F(1.0f) - step.keep.high) - step.keep.low
                               : F(std::numeric_limits<float>::quiet_NaN());
  const auto agreement = [&](int64_t i, int64_t n) BATCHOPS_INLINE_LAMBDA {
    return lamb::agreement(load_part(m + i, n), load_part(g + i, n) * c.g_scale);
  };
  const auto change = [&](int64_t i, int64_t n, F p_i) BATCHOPS_INLINE_LAMBDA {
    F q;
    if constexpr (kKept) {
      q = load<float>(quotients + i);
    } else {
      q = lamb::rough_quotient(load_part(m + i, n), load_part(v + i, n), c);
    }
    if constexpr (kCaution) q = lamb::where_positive(agreement(i, n), q);
    return fused(decay, p_i, step.step.high * q);
  };
  const auto exact = [&](int64_t i, int64_t n, F p_i) BATCHOPS_INLINE_LAMBDA {
    lamb::Quotient q = lamb::quotient(load_part(m + i, n), load_part(v + i, n), c);
    if constexpr (kCaution) {
      const F agree = agreement(i, n);
      q = {lamb::where_positive(agree, q.high), lamb::where_positive(agree, q.low)};
    }
    return lamb::updated(p_i, q, step);
  };
  for_each_line(
      count,
      [&](int64_t i) BATCHOPS_INLINE_LAMBDA {
        prefetch_ahead(i, p);
        if constexpr (!kKept) prefetch_ahead(i, m, v);
        if (i < ahead.count) {
          prefetch(ahead.p, i * ahead.p_bytes);
          prefetch(ahead.g, i * ahead.g_bytes);
        }
      },
      [&](int64_t i, int64_t n, auto vectors) BATCHOPS_INLINE_LAMBDA {
        constexpr int kVectors = decltype(vectors)::value;
        F p_i[kVectors], change_i[kVectors];
        bool small = true;
        for (int k = 0; k < kVectors; ++k) {
          const int64_t at = i + k * kLanes;
          p_i[k] = load_part(p + at, n);
          change_i[k] = change(at, n, p_i[k]);
          small &= small_beside(change_i[k], p_i[k]);
        }
        if (small) [[likely]] {
          for (int k = 0; k < kVectors; ++k) {
            store_part(p + i + k * kLanes, p_i[k] - change_i[k], n);
          }
          return;
        }
        for (int k = 0; k < kVectors; ++k) {
          const int64_t at = i + k * kLanes;
          const F exact_k =
              small_beside(change_i[k], p_i[k]) ? p_i[k] - change_i[k] : exact(at, n, p_i[k]);
          store_part(p + at, exact_k, n);
        }
      });
}

void lamb_moments(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,
                  float* quotients, LambNorms& norms) {
  const OptimizerTensor& x = *chunk.tensor;
  with_parameter_and_gradient(chunk, [&](auto* p, auto* g) {
    moments(p, g, x.m + chunk.begin, x.v + chunk.begin, chunk.count, factors, caution, quotients,
            norms);
  });
}

void lamb_apply(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,
                const LambStepFactors& step, const float* quotients, const Ahead& ahead) {
  const OptimizerTensor& x = *chunk.tensor;
  const float *m = x.m + chunk.begin, *v = x.v + chunk.begin;
  if (caution) {
    with_parameter_and_gradient(chunk, [&](auto* p, auto* g) {
      apply<true, false>(p, g, m, v, chunk.count, factors, step, nullptr, ahead);
    });
  } else {
    with_element(x.master ? DType::f32 : x.p_dtype, [&](auto* type) {
      auto* p = static_cast<decltype(type)>(x.master ? x.master : x.p) + chunk.begin;
      if (quotients != nullptr) {
        apply<false, true>(p, p, m, v, chunk.count, factors, step, quotients, ahead);
      } else {
        apply<false, false>(p, p, m, v, chunk.count, factors, step, nullptr, ahead);
      }
    });
  }
  if (x.master) publish(chunk);
}

// ---------------------------------------------------------------------------------------- LARS

template <class P, class G>
void lars_sums(const P* p, const G* g, int64_t count, F scale, F decay, LarsNorms& norms) {
  Squares p_sq, g_sq, u_sq;
  for_each_vector(
      count, [&](int64_t i) BATCHOPS_INLINE_LAMBDA { prefetch_ahead(i, p, g); },
      [&](int64_t i, int64_t n) BATCHOPS_INLINE_LAMBDA {
        const F p_i = load_part(p + i, n), g_i = load_part(g + i, n) * scale;
        p_sq.add(p_i);
        g_sq.add(g_i);
        u_sq.add(fma(decay, p_i, g_i));
      },
      [&]() BATCHOPS_INLINE_LAMBDA {
        p_sq.flush();
        g_sq.flush();
        u_sq.flush();
      });
  LarsNorms sums{p_sq.total(), g_sq.total(), u_sq.total()};
  if (!in_float_range(sums.p_sq) || !in_float_range(sums.g_sq) || !in_float_range(sums.u_sq)) {
    Squares p_wide, g_wide, u_wide;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t n = std::min(kLanes, count - i);
      const F p_i = load_part(p + i, n), g_i = load_part(g + i, n) * scale;
      p_wide.add_wide(p_i);
      g_wide.add_wide(g_i);
      u_wide.add_wide(fma(decay, p_i, g_i));
    }
    sums = {p_wide.total(), g_wide.total(), u_wide.total()};
  }
  norms += sums;
}

void lars_norms(const OptimizerChunk& chunk, float scale, float decay, LarsNorms& norms) {
  with_parameter_and_gradient(
      chunk, [&](auto* p, auto* g) { lars_sums(p, g, chunk.count, F(scale), F(decay), norms); });
}

// lars::buffer within two units in the last place of its largest addend. The product with p is kept
// whole, since g may all but cancel it.
BATCHOPS_INLINE F rough_buffer(F m, F g, F p, const lars::Constants& c) {
  F low;
  const F decay = product(c.k_p, p, low);
  low = fused(c.momentum.low, m, fused(c.k_g.low, g, low));
  return fused(c.momentum.high, m, fused(c.k_g.high, g, decay) + low);
}

// Without nesterov the gradient does not go to p itself, nor without momentum the buffer.
template <bool kMomentum, bool kDirect, class P, class G>
BATCHOPS_INLINE void lars_update(P* p, const G* g, float* m, int64_t count,
                                 const LarsFactors& factors) {
  const lars::Constants c(factors);
  for_each_vector(
      count,
      [&](int64_t i) BATCHOPS_INLINE_LAMBDA {
        prefetch_ahead(i, p, g);
        if constexpr (kMomentum) prefetch_ahead(i, m);
      },
      [&](int64_t i, int64_t n) BATCHOPS_INLINE_LAMBDA {
        const F p_i = load_part(p + i, n), g_i = load_part(g + i, n) * c.g_scale;
        F m_i(0.0f);
        bool small = false;
        if constexpr (kMomentum) {
          const F before = load_part(m + i, n);
          m_i = rough_buffer(before, g_i, p_i, c);
          small = small_beside(c.p_m.high * m_i, p_i);
          if (!small) m_i = lars::buffer(before, g_i, p_i, c);
          store_part(m + i, m_i, n);
        }
        if constexpr (kDirect) {
          store_part(p + i, lars::updated(p_i, g_i, m_i, c), n);
        } else if (small) {
          store_part(p + i, fused(c.p_m.high, m_i, p_i), n);
        } else {
          store_part(p + i, lars::moved(p_i, m_i, c), n);
        }
      },
      []() {});
}

void lars_apply(const OptimizerChunk& chunk, const LarsFactors& factors) {
  const OptimizerTensor& x = *chunk.tensor;
  const bool direct = factors.p_g[0] != 0 || factors.p_p[0] != 0;
  with_parameter_and_gradient(chunk, [&](auto* p, auto* g) {
    if (x.m == nullptr) return lars_update<false, true>(p, g, nullptr, chunk.count, factors);
    float* m = x.m + chunk.begin;
    if (direct) return lars_update<true, true>(p, g, m, chunk.count, factors);
    lars_update<true, false>(p, g, m, chunk.count, factors);
  });
  if (x.master) publish(chunk);
}
