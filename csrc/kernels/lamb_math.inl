// The elementwise formulas of LAMB, one text for CPU vectors and CUDA threads. Included inside a
// namespace that has
//   F                        a float or a vector of floats, with + - * / that round each once
//   fused(a, b, c)           a·b + c, rounded once
//   sqrt, max, min           of F; max and min keep a NaN in their first argument
//   select_le(a, b, y, n)    a <= b ? y : n
// after compensated.inl.
//
// In float with compensation: the error of each rounding that would show is computed and added
// back. m and v come out rounded once, and p within two units in the last place of
// max(|p|, |lr·r·u|), also where p is 0 and nothing hides u's own error. The error terms are exact
// only if the compiler leaves the operations as they stand: no contraction, no fast-math.

struct Constants {
  F g_scale;
  Factor beta1, k1, beta2, k2, eps, eps_inside, weight_decay;
  bool inside;
  BATCHOPS_OPTIMIZER_INLINE explicit Constants(const LambFactors& f)
      : g_scale(f.g_scale),
        beta1(f.beta1),
        k1(f.k1),
        beta2(f.beta2),
        k2(f.k2),
        eps(f.eps),
        eps_inside(f.eps_inside),
        weight_decay(f.weight_decay),
        inside(f.eps_inside[0] != 0) {}
};

// β1·m + k1·g
BATCHOPS_OPTIMIZER_INLINE F first_moment(F m, F g, const Constants& c) {
  const F a = c.beta1.high * m, b = c.k1.high * g;
  const F a_error = fused(c.beta1.low, m, fused(c.beta1.high, m, -a));
  const F b_error = fused(c.k1.low, g, fused(c.k1.high, g, -b));
  const F s = a + b;
  return s + (sum_error(a, b, s) + (a_error + b_error));
}

// β2·v + k2·g²; (k2·g)·g rather than k2·(g·g), which overflows sooner.
BATCHOPS_OPTIMIZER_INLINE F second_moment(F v, F g, const Constants& c) {
  const F t = c.k2.high * g;
  const F t_error = fused(c.k2.low, g, fused(c.k2.high, g, -t));
  return fused(c.beta2.high, v, fused(t, g, fused(t_error, g, c.beta2.low * v)));
}

// A value as high - low, good to about 2^-44; where it is a quotient by a root that is not much
// more than eps·b, to 2^-24 of it.
struct Quotient {
  F high, low;
};
// m / (sqrt(v + inside) + eps·b)
BATCHOPS_OPTIMIZER_INLINE Quotient quotient(F m, F v, const Constants& c) {
  F under = v, under_low(0.0f);
  if (c.inside) {
    under = v + c.eps_inside.high;
    under_low = sum_error(v, c.eps_inside.high, under) + c.eps_inside.low;
  }
  const F root = sqrt(under);
  const F d = root + c.eps.high;
  const F inverse = F(1.0f) / d;
  // d's low part: the addition's error, and the root's, (v - root²) / (2·root). 1 / d stands in for
  // 1 / root: where they differ, d has more of eps, and a smaller part of the root's error counts.
  // At worst, root = eps, a quarter of it in d is left.
  const F d_low = ((max(root, c.eps.high) - d) + min(root, c.eps.high)) +
                  fused(fused(root, root, -under) - under_low, F(-0.5f) * inverse, c.eps.low);
  const F q = m * inverse;
  return {q, fused(q, d_low, fused(q, d, -m)) * inverse};
}

// u / scale: q + λ·p / scale
BATCHOPS_OPTIMIZER_INLINE Quotient with_decay(const Quotient& q, F p, const Constants& c) {
  F error;
  const F t = product(c.weight_decay, p, error);
  const F s = q.high + t;
  return {s, q.low - (sum_error(q.high, t, s) + error)};
}

// The quotient in plain float: rounding errors of single elements average out in a norm. What is
// not inside the root is 0.
BATCHOPS_OPTIMIZER_INLINE F rough_quotient(F m, F v, const Constants& c) {
  return m / (sqrt(v + c.eps_inside.high) + c.eps.high);
}

// Above 0 where m and g point the same way; NaN where m is.
BATCHOPS_OPTIMIZER_INLINE F agreement(F m, F g) {
  const F zero(0.0f);
  return select_le(g, zero, select_le(zero, g, zero, -m), m);
}
BATCHOPS_OPTIMIZER_INLINE F where_positive(F agreement, F x) {
  return select_le(agreement, F(0.0f), F(0.0f), x);
}

struct StepConstants {
  Factor step, keep;
  BATCHOPS_OPTIMIZER_INLINE explicit StepConstants(const LambStepFactors& f)
      : step(f.step), keep(f.keep) {}
};

// keep·p - t + t_error, of whose roundings only the last counts.
BATCHOPS_OPTIMIZER_INLINE F updated(F p, F t, F t_error, const StepConstants& c) {
  F p_error;
  const F kept = product(c.keep, p, p_error);
  const F s = kept - t;
  return s + (sum_error(kept, -t, s) + (p_error - t_error));
}
// keep·p - step·u
BATCHOPS_OPTIMIZER_INLINE F updated(F p, F u, const StepConstants& c) {
  F t_error;
  const F t = product(c.step, u, t_error);
  return updated(p, t, t_error, c);
}
// keep·p - step·(q.high - q.low)
BATCHOPS_OPTIMIZER_INLINE F updated(F p, const Quotient& q, const StepConstants& c) {
  F t_error;
  const F t = product(c.step, q.high, t_error);
  return updated(p, t, fused(-c.step.high, q.low, t_error), c);
}
