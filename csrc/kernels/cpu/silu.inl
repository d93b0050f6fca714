// SiLU for kernels that it would otherwise hold up: the same function as activation.inl's, in about
// half the instructions.
//
//   kShort = false   float, within 4 ulp
//   kShort = true    for 16-bit elements: within 1e-4 (forward) and 1e-5 (backward) of the largest
//                    value nearby, well below what those can hold

template <bool kShort>
struct FastSilu {
  using V = Vec<float>;
  static constexpr Activation kKind = Activation::silu;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = false;

  static BATCHOPS_INLINE Vec<double> forward(Vec<double> z) { return Silu::forward(z); }
  static BATCHOPS_INLINE Vec<double> backward(Vec<double> dy, Vec<double> z) {
    return Silu::backward(dy, z);
  }

  static BATCHOPS_INLINE V forward(V z) {
    // σ(z) = 1 / (1 + e^-z): infinity in the denominator gives 0, and NaN at z = -∞.
    if constexpr (kShort) return z * estimate(V(1.0f) + exp_short(z, 128.5f));
    const Logistic<V> s = of(z);
    return z * s.value;
  }
  static BATCHOPS_INLINE V backward(V dy, V z) {
    if constexpr (kShort) {
      // Finite, for the sake of the reciprocal's step; 2^-126 stands for a lesser σ.
      const V s = reciprocal(V(1.0f) + exp_short(z, 126.0f));
      return dy * (s * fma(z, V(1.0f) - s, V(1.0f)));
    }
    const Logistic<V> s = of(z);
    return dy * (s.value * fma(z, s.complement, V(1.0f)));
  }

  static BATCHOPS_INLINE Logistic<V> of(V z) {
    const V e = exp_negative(-abs(z));
    const V large = reciprocal(V(1.0f) + e);
    const V small = e * large;
    return {select_le(V(0.0f), z, large, small), select_le(V(0.0f), z, small, large)};
  }

#if defined(BATCHOPS_ISA_AVX512)
  // Within 2^-14, of normal numbers.
  static BATCHOPS_INLINE V estimate(V a) { return _mm512_rcp14_ps(a.v); }
  static BATCHOPS_INLINE V reciprocal(V a) {
    const V y = estimate(a);
    return fma(y, fma(-a, y, V(1.0f)), y);
  }
  static BATCHOPS_INLINE V round(V a) { return _mm512_roundscale_ps(a.v, 0); }
  static BATCHOPS_INLINE V times_power(V a, V n) { return _mm512_scalef_ps(a.v, n.v); }
  // e^a for a <= 0, as exp().
  static BATCHOPS_INLINE V exp_negative(V a) {
    a = max(a, V(-104.0f));
    const V n = round(a * V(1.44269504f));
    V r = fma(n, V(-0.693359375f), a);
    r = fma(n, V(2.12194440e-4f), r);
    V p(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
      p = fma(p, r, V(c));
    }
    return times_power(p, n);
  }
#else
  static BATCHOPS_INLINE V estimate(V a) { return V(1.0f) / a; }
  static BATCHOPS_INLINE V reciprocal(V a) { return V(1.0f) / a; }
  static BATCHOPS_INLINE V round(V a) {
    const V shifter(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    return (a + shifter) - shifter;
  }
  static BATCHOPS_INLINE V times_power(V a, V n) {
    using U = Native<float>::U;
    const V magic(12582912.0f + 127.0f);
    return a * V((Native<float>::V)((U)(n + magic).v << 23));
  }
  static BATCHOPS_INLINE V exp_negative(V a) { return exp(a); }
#endif

  // e^-z within 4e-6, at least 2^-126 and at most 2^most, infinity from 2^128.5 on.
  static BATCHOPS_INLINE V exp_short(V z, float most) {
    const V t = min(max(z * V(-1.44269504f), V(-126.0f)), V(most));
    const V n = round(t), r = t - n;
    V p(0.00957009848f);
    for (float c : {0.0559178591f, 0.240247443f, 0.693121791f, 0.999999285f}) p = fma(p, r, V(c));
    return times_power(p, n);
  }
};
