// The activation functors over whole tensors, by differentiable torch operations: what the double
// backward and the stock-op fallback use. The functors themselves are in kernels/activation.inl.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/erfc.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/le.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>

#include "kernels/common.h"

namespace batchops::binding::functors {

// A tensor, or a number that takes the dtype and device of the tensor it meets.
struct Lane {
  at::Tensor tensor;
  double number = 0;

  Lane(at::Tensor t) : tensor(std::move(t)) {}
  explicit Lane(double value) : number(value) {}

  bool is_number() const { return !tensor.defined(); }
  at::Tensor like(const at::Tensor& other) const {
    return is_number() ? at::full_like(other, number) : tensor;
  }
};

// f over two tensors, a tensor and a number, or two numbers (which stay a number).
template <class F>
auto meet(const Lane& a, const Lane& b, F&& f) {
  if (a.is_number()) return f(a.like(b.tensor), b.tensor);
  return b.is_number() ? f(a.tensor, b.number) : f(a.tensor, b.tensor);
}
#define BATCHOPS_LANE_OPERATOR(op)                                                      \
  inline Lane operator op(const Lane& a, const Lane& b) {                               \
    if (a.is_number() && b.is_number()) return Lane(a.number op b.number);              \
    return meet(a, b, [](const at::Tensor& x, const auto& y) { return Lane(x op y); }); \
  }
BATCHOPS_LANE_OPERATOR(+)
BATCHOPS_LANE_OPERATOR(-)
BATCHOPS_LANE_OPERATOR(*)
BATCHOPS_LANE_OPERATOR(/)
#undef BATCHOPS_LANE_OPERATOR

// At least one of a and b is a tensor.
inline Lane select_le(const Lane& a, const Lane& b, const Lane& yes, const Lane& no) {
  const at::Tensor& like = a.is_number() ? b.tensor : a.tensor;
  const at::Tensor below =
      meet(a, b, [](const at::Tensor& x, const auto& y) { return at::le(x, y); });
  return at::where(below, yes.like(like), no.like(like));
}
inline Lane max(const Lane& a, const Lane& b) {
  const at::Tensor& like = a.is_number() ? b.tensor : a.tensor;
  const at::Tensor below =
      meet(a, b, [](const at::Tensor& x, const auto& y) { return at::lt(x, y); });
  return at::where(below, b.like(like), a.like(like));
}
inline Lane min(const Lane& a, const Lane& b) {
  const at::Tensor& like = a.is_number() ? b.tensor : a.tensor;
  const at::Tensor above =
      meet(a, b, [](const at::Tensor& x, const auto& y) { return at::gt(x, y); });
  return at::where(above, b.like(like), a.like(like));
}
// `bits` is a tensor of bool.
inline Lane select_bits(const at::Tensor& bits, const Lane& yes, const Lane& no) {
  return at::where(bits, yes.tensor, no.like(yes.tensor));
}

template <class V>
struct Logistic;
inline Logistic<Lane> logistic(const Lane& z);

struct Normal {
  Lane cdf, pdf;
};
inline Normal normal(const Lane& z) {
  return {at::erfc(z.tensor * -0.70710678118654752440) * 0.5,
          at::exp(z.tensor * z.tensor * -0.5) * 0.39894228040143267794};
}

using Scalar = double;
#define BATCHOPS_INLINE inline
#define BATCHOPS_NOINLINE inline
#include "kernels/activation.inl"
#undef BATCHOPS_NOINLINE
#undef BATCHOPS_INLINE

// Not by |z|, whose own derivative at 0 would be wrong here.
inline Logistic<Lane> logistic(const Lane& z) {
  return {at::sigmoid(z.tensor), at::sigmoid(-z.tensor)};
}

}  // namespace batchops::binding::functors

namespace batchops::binding {

using functors::traits_of;

// torch's default; read by leaky_relu alone.
constexpr double kDefaultSlope = 0.01;

inline at::Tensor activation_forward(Activation activation, const at::Tensor& z,
                                     double slope = kDefaultSlope) {
  return functors::AnyActivation{activation, slope}.forward(functors::Lane(z)).tensor;
}

inline at::Tensor activation_backward(Activation activation, const at::Tensor& dy,
                                      const at::Tensor& z, double slope = kDefaultSlope) {
  return functors::AnyActivation{activation, slope}
      .backward(functors::Lane(dy), functors::Lane(z))
      .tensor;
}

// From the bits of a mask, as a tensor of bool, where traits_of(activation).maskable.
inline at::Tensor activation_backward_bits(Activation activation, const at::Tensor& dy,
                                           const at::Tensor& bits, double slope = kDefaultSlope) {
  return functors::AnyActivation{activation, slope}.backward_bits(functors::Lane(dy), bits).tensor;
}

}  // namespace batchops::binding
