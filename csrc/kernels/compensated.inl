// Arithmetic in float whose rounding errors are kept, for CPU vectors and CUDA threads. Included
// inside a namespace that has
//   F                        a float or a vector of floats, with + - * / that round each once
//   fused(a, b, c)           a·b + c, rounded once
// and BATCHOPS_OPTIMIZER_INLINE defined. The error terms are exact only if the compiler leaves the
// operations as they stand: no contraction, no fast-math.

// The rounding error of s = fl(a + b), exactly.
BATCHOPS_OPTIMIZER_INLINE F sum_error(F a, F b, F s) {
  const F b_part = s - a;
  return (a - (s - b_part)) + (b - b_part);
}

// A factor held as the sum of two floats.
struct Factor {
  F high, low;
  BATCHOPS_OPTIMIZER_INLINE explicit Factor(const float (&f)[2]) : high(f[0]), low(f[1]) {}
};

// A product whose rounding error goes into `error`.
BATCHOPS_OPTIMIZER_INLINE F product(const Factor& k, F x, F& error) {
  const F t = k.high * x;
  error = fused(k.low, x, fused(k.high, x, -t));
  return t;
}
