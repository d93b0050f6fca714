// The elementwise formulas of LARS, one text for CPU vectors and CUDA threads. Included after
// compensated.inl. m comes out rounded once; p within two units in the last place of
// max(|p|, |update|).

struct Constants {
  F g_scale;
  Factor momentum, k_g, k_p, p_g, p_p, p_m;
  BATCHOPS_OPTIMIZER_INLINE explicit Constants(const LarsFactors& f)
      : g_scale(f.g_scale),
        momentum(f.momentum),
        k_g(f.k_g),
        k_p(f.k_p),
        p_g(f.p_g),
        p_p(f.p_p),
        p_m(f.p_m) {}
};

// A sum and its error.
struct Sum {
  F value, error;
};
// a·x + b·y + c·z
BATCHOPS_OPTIMIZER_INLINE Sum sum_of_products(const Factor& a, F x, const Factor& b, F y,
                                              const Factor& c, F z) {
  F x_error, y_error, z_error;
  const F s = product(a, x, x_error), t = product(b, y, y_error), u = product(c, z, z_error);
  const F st = s + t;
  const F st_error = sum_error(s, t, st);
  const F stu = st + u;
  const F stu_error = sum_error(st, u, stu);
  return {stu, (st_error + stu_error) + (x_error + (y_error + z_error))};
}

// μ·m + k_g·g + k_p·p
BATCHOPS_OPTIMIZER_INLINE F buffer(F m, F g, F p, const Constants& c) {
  const Sum sum = sum_of_products(c.momentum, m, c.k_g, g, c.k_p, p);
  return sum.value + sum.error;
}
// p - p_m·m, the factor with its minus
BATCHOPS_OPTIMIZER_INLINE F moved(F p, F m, const Constants& c) {
  F error;
  const F t = product(c.p_m, m, error);
  const F s = p + t;
  return s + (sum_error(p, t, s) + error);
}
// p - (p_g·g + p_p·p + p_m·m), the factors with their minus
BATCHOPS_OPTIMIZER_INLINE F updated(F p, F g, F m, const Constants& c) {
  const Sum sum = sum_of_products(c.p_g, g, c.p_p, p, c.p_m, m);
  const F all = sum.value + p;
  return all + (sum_error(sum.value, p, all) + sum.error);
}
