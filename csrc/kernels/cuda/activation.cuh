// The activation functors over float, for device code.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

// Written with comparisons: fmaxf would turn a NaN into the other argument.
BATCHOPS_DEVICE float max(float a, float b) { return a < b ? b : a; }
BATCHOPS_DEVICE float min(float a, float b) { return b < a ? b : a; }
BATCHOPS_DEVICE float select_le(float a, float b, float yes, float no) { return a <= b ? yes : no; }
BATCHOPS_DEVICE float select_bits(unsigned bit, float yes, float no) { return bit != 0 ? yes : no; }
BATCHOPS_DEVICE float abs(float a) { return ::fabsf(a); }
BATCHOPS_DEVICE float exp(float a) { return ::expf(a); }

// The standard normal distribution: Φ(z) = erfc(w) / 2 with w = -z / √2, φ(z) = e^(-z²/2) / √(2π).
struct Normal {
  float cdf, pdf;
};
BATCHOPS_DEVICE Normal normal(float z) {
  constexpr float kInverseRoot2 = 0.707106769f, kRest = 1.21016175e-8f;
  const float x = min(abs(z), 15.0f);  // beyond, Φ(-x) is 0 in float
  const float square = x * x;
  const float e = ::expf(-0.5f * square);
  // What rounding x² and w loses would cost as many ulp as x² / 2.
  const float density = ::fmaf(e, -0.5f * ::fmaf(x, x, -square), e);
  const float w = x * kInverseRoot2;
  const float lost = ::fmaf(x, kInverseRoot2, -w) + x * kRest;
  const float tail = ::fmaf(-0.564189584f * density, lost, 0.5f * ::erfcf(w));
  return {select_le(z, 0.0f, tail, 1.0f - tail), 0.398942280f * density};
}

// 2^a and 1 / a, to two units in the last place and one; denormal results are 0.
BATCHOPS_DEVICE float exp2_fast(float a) {
#ifdef BATCHOPS_CUDA_EMULATOR
  const float power = ::exp2f(a);
  return power < 1.17549435e-38f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a));
  return power;
#endif
}
BATCHOPS_DEVICE float inverse_fast(float a) {
#ifdef BATCHOPS_CUDA_EMULATOR
  const float inverse = 1.0f / a;
  return ::fabsf(inverse) < 1.17549435e-38f ? 0.0f : inverse;
#else
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  return inverse;
#endif
}

// σ(z) = 1 / (1 + e^-z) and 1 - σ(z), neither of them by a difference, in a third of the
// instructions that exp and a division take: a GPU reads the elements of bfloat16 faster than those
// could be done. Beyond 2^127 the inverse of e^-z is 0, and both are: so z · σ(z) is NaN at -∞
// alone.
struct FastLogistic {
  float value, complement;
};
BATCHOPS_DEVICE FastLogistic logistic(float z) {
  constexpr float kLog2E = 1.44269502f;
  constexpr float kMost = 1.70141183e38f;  // 2^127
  const float e = exp2_fast(-kLog2E * z);
  const float value = inverse_fast(1.0f + e);
  return {value, ::fminf(e, kMost) * value};
}

// A float of which 16 bits will be kept: 1 - σ(z) is a difference, off by 2^-24, which saves two of
// nine instructions.
struct Coarse {
  float v;

  template <class Number>
  BATCHOPS_DEVICE explicit Coarse(Number value) : v(static_cast<float>(value)) {}
  BATCHOPS_DEVICE friend Coarse operator+(Coarse a, Coarse b) { return Coarse(a.v + b.v); }
  BATCHOPS_DEVICE friend Coarse operator-(Coarse a, Coarse b) { return Coarse(a.v - b.v); }
  BATCHOPS_DEVICE friend Coarse operator*(Coarse a, Coarse b) { return Coarse(a.v * b.v); }
};
BATCHOPS_DEVICE Coarse max(Coarse a, Coarse b) { return Coarse(max(a.v, b.v)); }
BATCHOPS_DEVICE Coarse min(Coarse a, Coarse b) { return Coarse(min(a.v, b.v)); }
BATCHOPS_DEVICE Coarse select_le(Coarse a, Coarse b, Coarse yes, Coarse no) {
  return Coarse(select_le(a.v, b.v, yes.v, no.v));
}
struct CoarseLogistic {
  Coarse value, complement;
};
BATCHOPS_DEVICE CoarseLogistic logistic(Coarse z) {
  const Coarse value(logistic(z.v).value);
  return {value, Coarse(1.0f) - value};
}
struct CoarseNormal {
  Coarse cdf, pdf;
};
BATCHOPS_DEVICE CoarseNormal normal(Coarse z) {
  const Normal found = normal(z.v);
  return {Coarse(found.cdf), Coarse(found.pdf)};
}

using Scalar = float;
#define BATCHOPS_INLINE BATCHOPS_DEVICE
#define BATCHOPS_NOINLINE BATCHOPS_DEVICE
#include "kernels/activation.inl"
#undef BATCHOPS_NOINLINE
#undef BATCHOPS_INLINE

// Whether a kernel's activation is known at run time only.
template <class Act>
constexpr bool kAnyActivation = std::is_same_v<Act, AnyActivation>;

// Calls f(functor) with the one that it stands for.
template <class F>
BATCHOPS_DEVICE void with_functor(const AnyActivation& act, F&& f) {
  switch (act.kind) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return f(make_functor<functor>(act.slope));
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
}

// a[j] = f(functor, a[j], b[j]). With AnyActivation b is lost: there each functor has a loop of its
// own whose code holds kMost elements only, and the arrays move past them, since an index known at
// run time would put them into local memory.
//
//   a  0 1 2 3 4 5 6 7  →  2 3 4 5 6 7 0' 1'  →  …  →  0' 1' 2' 3' 4' 5' 6' 7'
template <int kMost = 2, class Act, int W, class F>
BATCHOPS_DEVICE void for_each_element(const Act& act, float (&a)[W], float (&b)[W], F f) {
  if constexpr (!kAnyActivation<Act>) {
#pragma unroll
    for (int j = 0; j < W; ++j) a[j] = f(act, a[j], b[j]);
  } else {
    constexpr int kAtOnce = W < kMost ? W : kMost;
    with_functor(act, [&](auto functor) {
#pragma unroll 1
      for (int turn = 0; turn < W; turn += kAtOnce) {
        float done[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) done[j] = f(functor, a[j], b[j]);
#pragma unroll
        for (int j = 0; j + kAtOnce < W; ++j) {
          a[j] = a[j + kAtOnce];
          b[j] = b[j + kAtOnce];
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) a[W - kAtOnce + j] = done[j];
      }
    });
  }
}

// Null if there is no mask, or one can stand for z.
inline const char* check_mask(const char* operation, Activation activation, const void* mask) {
  if (mask == nullptr || traits_of(activation).maskable) return nullptr;
  return message("%s: expected no mask with an activation whose derivative needs more than a bit",
                 operation);
}

}  // namespace batchops::cuda
