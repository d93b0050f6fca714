// The activation functors over whole tensors, by differentiable torch operations: what the double
// backward and the stock-op fallback use. The functors themselves are in kernels/activation.inl.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/le.h>
#include <ATen/ops/where.h>

#include "kernels/common.h"

namespace batchops::binding::functors {

// A tensor, or a number that takes the dtype and device of the tensor it meets.
struct Lane {
  at::Tensor tensor;
  double number = 0;

  Lane(at::Tensor t) : tensor(std::move(t)) {}
  explicit Lane(double value) : number(value) {}

  at::Tensor like(const at::Tensor& other) const {
    return tensor.defined() ? tensor : at::full_like(other, number);
  }
};

inline Lane select_le(const Lane& a, const Lane& b, const Lane& yes, const Lane& no) {
  const at::Tensor below =
      b.tensor.defined() ? at::le(a.tensor, b.tensor) : at::le(a.tensor, b.number);
  return at::where(below, yes.like(a.tensor), no.like(a.tensor));
}

#define BATCHOPS_INLINE inline
#include "kernels/activation.inl"
#undef BATCHOPS_INLINE

}  // namespace batchops::binding::functors

namespace batchops::binding {

inline at::Tensor activation_forward(Activation activation, const at::Tensor& z) {
  switch (activation) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return functors::functor::forward(functors::Lane(z)).tensor;
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
  return z;
}

inline at::Tensor activation_backward(Activation activation, const at::Tensor& dy,
                                      const at::Tensor& z) {
  switch (activation) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return functors::functor::backward(functors::Lane(dy), functors::Lane(z)).tensor;
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
  return dy;
}

// Whether the backward must know z = norm + residual, and whether one bit of it is enough.
struct ActivationTraits {
  bool needs_z;
  bool maskable;
};

inline ActivationTraits traits_of(Activation activation) {
  switch (activation) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return {functors::functor::kNeedsZ, functors::functor::kMaskable};
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
  return {false, false};
}

}  // namespace batchops::binding
