// LAMB on one chunk of one tensor. Compile with -ffp-contract=off: see lamb_math.inl.

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

#define BATCHOPS_LAMB_INLINE BATCHOPS_INLINE
#include "kernels/lamb_math.inl"
#undef BATCHOPS_LAMB_INLINE

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
};
// Squares below the smallest normal float lose places, those above the largest overflow. A chunk's
// sum inside these bounds has lost less than 1e-7 of itself; outside (or NaN) it is formed anew.
BATCHOPS_INLINE bool in_float_range(double sum_sq) { return sum_sq > 1e-26 && sum_sq < 1e38; }

constexpr int64_t kFlushEvery = 16;  // vectors

// step(i, n): elements [i, i + n), n = kLanes but for the last one; flush() every few steps.
template <class Step, class Flush>
BATCHOPS_INLINE void for_each_vector(int64_t count, Step&& step, Flush&& flush) {
  int64_t i = 0;
  while (count - i >= kLanes) {
    const int64_t run_end = std::min(i + kFlushEvery * kLanes, count - kLanes + 1);
    for (; i < run_end; i += kLanes) step(i, kLanes);
    flush();
  }
  if (i < count) step(i, count - i);
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
double grad_sq(const G* g, int64_t count) {
  Squares squares[4];
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) squares[k].add_wide(load<float>(g + i + k * kLanes));
  }
  for (; i < count; i += kLanes) {
    squares[0].add_wide(load_part(g + i, std::min(kLanes, count - i)));
  }
  return (squares[0].total() + squares[1].total()) + (squares[2].total() + squares[3].total());
}

// The norms once more, where float's range did not do.
template <class P>
void norms_in_double(const P* p, const float* m, const float* v, int64_t count, const Constants& c,
                     LambNorms& norms) {
  Squares p_sq, u_sq;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    const F p_i = load_part(p + i, n);
    const F u =
        fused(c.weight_decay, p_i, quotient(load_part(m + i, n), load_part(v + i, n), c).high);
    p_sq.add_wide(p_i);
    u_sq.add_wide(only_part(u, n));
  }
  norms = {p_sq.total(), u_sq.total()};
}

template <class P, class G>
void moments(const P* p, const G* g, float* m, float* v, int64_t count, const LambFactors& factors,
             LambNorms* norms) {
  const Constants c(factors);
  const auto advance = [&](int64_t i, int64_t n, F& m_i, F& v_i) BATCHOPS_INLINE_LAMBDA {
    const F g_i = load_part(g + i, n) * c.g_scale;
    m_i = first_moment(load_part(m + i, n), g_i, c);
    v_i = second_moment(load_part(v + i, n), g_i, c);
    store_part(m + i, m_i, n);
    store_part(v + i, v_i, n);
  };
  F m_i, v_i;
  if (norms == nullptr) {
    for (int64_t i = 0; i < count; i += kLanes) advance(i, std::min(kLanes, count - i), m_i, v_i);
    return;
  }
  Squares p_sq, u_sq;
  for_each_vector(
      count,
      [&](int64_t i, int64_t n) BATCHOPS_INLINE_LAMBDA {
        advance(i, n, m_i, v_i);
        const F p_i = load_part(p + i, n);
        // Rounding errors of single elements average out in the norm: no compensation here.
        const F u = fused(c.weight_decay, p_i, m_i / (sqrt(v_i) + c.eps.high));
        p_sq.add(p_i);
        u_sq.add(only_part(u, n));
      },
      [&]() BATCHOPS_INLINE_LAMBDA {
        p_sq.flush();
        u_sq.flush();
      });
  LambNorms sums = {p_sq.total(), u_sq.total()};
  if (!in_float_range(sums.p_sq) || !in_float_range(sums.u_sq)) {
    norms_in_double(p, m, v, count, c, sums);
  }
  norms->p_sq += sums.p_sq;
  norms->u_sq += sums.u_sq;
}

template <class P>
void apply(P* p, const float* m, const float* v, int64_t count, const LambFactors& factors,
           const LambStepFactors& step_factors) {
  const Constants c(factors);
  const StepConstants step(step_factors);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    const Quotient q = quotient(load_part(m + i, n), load_part(v + i, n), c);
    store_part(p + i, updated(load_part(p + i, n), q, step), n);
  }
}

// f(T*) with the element type of `dtype`.
template <class F_>
BATCHOPS_INLINE auto with_element(DType dtype, F_&& f) {
  return dtype == DType::f16    ? f(static_cast<Half*>(nullptr))
         : dtype == DType::bf16 ? f(static_cast<BFloat16*>(nullptr))
                                : f(static_cast<float*>(nullptr));
}

double lamb_grad_sq(const LambChunk& chunk) {
  return with_element(chunk.tensor->g_dtype, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    return grad_sq(static_cast<const G*>(chunk.tensor->g) + chunk.begin, chunk.count);
  });
}

void lamb_moments(const LambChunk& chunk, const LambFactors& factors, LambNorms* norms) {
  const LambTensor& x = *chunk.tensor;
  with_element(x.p_dtype, [&](auto* p_type) {
    with_element(x.g_dtype, [&](auto* g_type) {
      using P = std::remove_pointer_t<decltype(p_type)>;
      using G = std::remove_pointer_t<decltype(g_type)>;
      moments(static_cast<const P*>(x.p) + chunk.begin, static_cast<const G*>(x.g) + chunk.begin,
              x.m + chunk.begin, x.v + chunk.begin, chunk.count, factors, norms);
    });
  });
}

void lamb_apply(const LambChunk& chunk, const LambFactors& factors, const LambStepFactors& step) {
  const LambTensor& x = *chunk.tensor;
  with_element(x.p_dtype, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    apply(static_cast<P*>(x.p) + chunk.begin, x.m + chunk.begin, x.v + chunk.begin, chunk.count,
          factors, step);
  });
}
