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
    // z σ(z), σ(z) = 1 / (1 + e^-z): infinity in the denominator gives 0, and NaN at z = -∞.
    if constexpr (kShort) return quotient(z, one_and_exp(z, 128.25f));
    return z * value(z);
  }
  static BATCHOPS_INLINE V backward(V dy, V z) {
    if constexpr (kShort) {
      // Finite, for the sake of the reciprocal's step; 2^-126 stands for a lesser σ.
      const V s = reciprocal(one_and_exp(z, 126.0f));
      return dy * (s * fma(z, V(1.0f) - s, V(1.0f)));
    }
    const Logistic<V> s = of(z);
    return dy * (s.value * fma(z, s.complement, V(1.0f)));
  }

  // min(max(a, low), high). The instructions give the second operand where one is NaN.
  static BATCHOPS_INLINE V clamp(V a, float low, float high) {
#if defined(BATCHOPS_ISA_AVX512)
    return _mm512_min_ps(V(high).v, _mm512_max_ps(V(low).v, a.v));
#elif defined(BATCHOPS_ISA_AVX2)
    return _mm256_min_ps(V(high).v, _mm256_max_ps(V(low).v, a.v));
#else
    return min(max(a, V(low)), V(high));
#endif
  }

  // 1 + e^-z, where e^-z is within 4e-6, at least 2^-126, at most 2^most, and infinite from 2^128
  // on.
  static BATCHOPS_INLINE V one_and_exp(V z, float most) {
    const V t = clamp(z * V(-1.44269504f), -126.0f, most);
    const Rounded n(t);
    const V r = t - n.value;
    V p(0.00957009848f);
    for (float c : {0.0559178591f, 0.240247443f, 0.693121791f, 0.999999285f}) p = fma(p, r, V(c));
    return n.one_and_power_times(p);
  }

#if defined(BATCHOPS_ISA_AVX512)
  // Within 2^-14, of normal numbers.
  static BATCHOPS_INLINE V estimate(V a) { return _mm512_rcp14_ps(a.v); }
  static BATCHOPS_INLINE V quotient(V a, V b) { return a * estimate(b); }
  static BATCHOPS_INLINE V reciprocal(V a) {
    const V y = estimate(a);
    return fma(y, fma(-a, y, V(1.0f)), y);
  }
  static BATCHOPS_INLINE V round(V a) { return _mm512_roundscale_ps(a.v, 0); }
  static BATCHOPS_INLINE V times_power(V a, V n) { return _mm512_scalef_ps(a.v, n.v); }
  struct Rounded {
    V value;
    BATCHOPS_INLINE explicit Rounded(V t) : value(round(t)) {}
    BATCHOPS_INLINE V one_and_power_times(V p) const { return V(1.0f) + times_power(p, value); }
  };

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
  static BATCHOPS_INLINE Logistic<V> of(V z) {
    const V e = exp_negative(-abs(z));
    const V large = reciprocal(V(1.0f) + e);
    const V small = e * large;
    return {select_le(V(0.0f), z, large, small), select_le(V(0.0f), z, small, large)};
  }
  static BATCHOPS_INLINE V value(V z) { return of(z).value; }
#else
  static BATCHOPS_INLINE V quotient(V a, V b) { return a / b; }
  static BATCHOPS_INLINE V reciprocal(V a) { return V(1.0f) / a; }
  // Adding 1.5 · 2^23 rounds to an integer, and adds it to the bits: with the exponent's bias
  // besides, they lack no more than a shift to be those of 2^n.
  struct Rounded {
    V value;
    Native<float>::U bits;
    BATCHOPS_INLINE explicit Rounded(V t) {
      const V shifter(12582912.0f + 127.0f), sum = t + shifter;
      value = sum - shifter;
      bits = (Native<float>::U)sum.v;
    }
    BATCHOPS_INLINE V one_and_power_times(V p) const {
      return fma(p, V((Native<float>::V)(bits << 23)), V(1.0f));
    }
  };

  // e^-z = p b / a. With e^-z = 2^n p, a = 2^-h and b = 2^(n - h), h = ⌊n / 2⌋, since n may pass
  // the largest exponent. From |z| = 176 on either a or b is 0.
  struct Ratio {
    V p, b, a;
  };
  static BATCHOPS_INLINE Ratio exp_ratio(V z) {
    using U = Native<float>::U;
    const V clamped = clamp(z, -176.0f, 176.0f);
    const V shifter(12582912.0f + 254.0f);  // as in Rounded, with the bias of two
    const V sum = fma(clamped, V(-1.44269504f), shifter), n = sum - shifter;
    V q = fma(n, V(0.693359375f), clamped);  // z + n ln 2 in two steps, so p = e^-q
    q = fma(n, V(-2.12194440e-4f), q);
    V p(0.0013814222f);
    for (float c : {-0.00836889875f, 0.0416684057f, -0.166665191f, 0.499999933f}) {
      p = fma(p, q, V(c));
    }
    const U bits = (U)sum.v, half = bits >> 1;
    const auto power = [](U exponent)
                           BATCHOPS_INLINE_LAMBDA { return V((Native<float>::V)(exponent << 23)); };
    return {fma(p, q * q, V(1.0f) - q), power(bits - half), power(254u - half)};
  }
  // σ = a / (a + p b), 1 - σ = p b / (a + p b)
  static BATCHOPS_INLINE Logistic<V> of(V z) {
    const Ratio e = exp_ratio(z);
    const V pb = e.p * e.b, inverse = reciprocal(e.a + pb);
    return {e.a * inverse, pb * inverse};
  }
  static BATCHOPS_INLINE V value(V z) {
    const Ratio e = exp_ratio(z);
    return e.a / fma(e.p, e.b, e.a);
  }
#endif
};
