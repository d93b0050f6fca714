// The elementwise formulas of LAMB, one text for CPU vectors and CUDA threads. Included inside a
// namespace that has
//   F                        a float or a vector of floats, with + - * / that round each once
//   fused(a, b, c)           a·b + c, rounded once
//   sqrt, max, min           of F; max and min keep a NaN in their first argument
// and BATCHOPS_LAMB_INLINE defined.
//
// In float with compensation: the error of each rounding that would show is computed and added
// back. m and v come out rounded once, and p within two units in the last place of
// max(|p|, |lr·r·u|), also where p is 0 and nothing hides u's own error. The error terms are exact
// only if the compiler leaves the operations as they stand: no contraction, no fast-math.

// The rounding error of s = fl(a + b), exactly.
BATCHOPS_LAMB_INLINE F sum_error(F a, F b, F s) {
  const F b_part = s - a;
  return (a - (s - b_part)) + (b - b_part);
}

// A factor held as the sum of two floats.
struct Factor {
  F high, low;
  BATCHOPS_LAMB_INLINE explicit Factor(const float (&f)[2]) : high(f[0]), low(f[1]) {}
};

struct Constants {
  F g_scale, weight_decay;
  Factor beta1, k1, beta2, k2, eps;
  BATCHOPS_LAMB_INLINE explicit Constants(const LambFactors& f)
      : g_scale(f.g_scale),
        weight_decay(f.weight_decay),
        beta1(f.beta1),
        k1(f.k1),
        beta2(f.beta2),
        k2(f.k2),
        eps(f.eps) {}
};

// β1·m + k1·g
BATCHOPS_LAMB_INLINE F first_moment(F m, F g, const Constants& c) {
  const F a = c.beta1.high * m, b = c.k1.high * g;
  const F a_error = fused(c.beta1.low, m, fused(c.beta1.high, m, -a));
  const F b_error = fused(c.k1.low, g, fused(c.k1.high, g, -b));
  const F s = a + b;
  return s + (sum_error(a, b, s) + (a_error + b_error));
}

// β2·v + k2·g²; (k2·g)·g rather than k2·(g·g), which overflows sooner.
BATCHOPS_LAMB_INLINE F second_moment(F v, F g, const Constants& c) {
  const F t = c.k2.high * g;
  const F t_error = fused(c.k2.low, g, fused(c.k2.high, g, -t));
  return fused(c.beta2.high, v, fused(t, g, fused(t_error, g, c.beta2.low * v)));
}

// m / (sqrt(v) + eps·b) as high - low, good to about 2^-44.
struct Quotient {
  F high, low;
};
BATCHOPS_LAMB_INLINE Quotient quotient(F m, F v, const Constants& c) {
  const F root = sqrt(v);
  const F d = root + c.eps.high;
  const F inverse = F(1.0f) / d;
  // d's low part: the addition's error, and the root's, (v - root²) / (2·root). 1 / d stands in for
  // 1 / root: where they differ much, eps is so large that the root's error hardly counts.
  const F d_low = ((max(root, c.eps.high) - d) + min(root, c.eps.high)) +
                  fused(fused(root, root, -v), F(-0.5f) * inverse, c.eps.low);
  const F q = m * inverse;
  return {q, fused(q, d_low, fused(q, d, -m)) * inverse};
}

struct StepConstants {
  Factor step;
  F decay;
  BATCHOPS_LAMB_INLINE explicit StepConstants(const LambStepFactors& f)
      : step(f.step), decay(f.decay) {}
};

// p - (step·(q.high - q.low) + decay·p), of whose roundings only the last counts.
BATCHOPS_LAMB_INLINE F updated(F p, const Quotient& q, const StepConstants& c) {
  const F t = c.step.high * q.high;
  const F t_error =
      fused(-c.step.high, q.low, fused(c.step.low, q.high, fused(c.step.high, q.high, -t)));
  const F s = p - t;
  return s + (sum_error(p, -t, s) - fused(c.decay, p, t_error));
}
