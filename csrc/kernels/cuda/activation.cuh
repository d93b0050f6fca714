// The activation functors over float, for device code.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

// Written with comparisons: fmaxf would turn a NaN into the other argument.
BATCHOPS_DEVICE float max(float a, float b) { return a < b ? b : a; }
BATCHOPS_DEVICE float select_le(float a, float b, float yes, float no) { return a <= b ? yes : no; }

#define BATCHOPS_INLINE BATCHOPS_DEVICE
#include "kernels/activation.inl"
#undef BATCHOPS_INLINE

// Calls f(TypeIs<Functor>{}).
template <class F>
const char* dispatch_activation(const char* operation, Activation activation, F&& f) {
  switch (activation) {
#define BATCHOPS_ACTIVATION_CASE(name, functor) \
  case Activation::name:                        \
    return f(TypeIs<functor>{});
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_ACTIVATION_CASE)
#undef BATCHOPS_ACTIVATION_CASE
  }
  return message("%s: unknown activation %d", operation, static_cast<int>(activation));
}

// Null if there is no mask, or one can stand for z.
inline const char* check_mask(const char* operation, Activation activation, const void* mask) {
  if (mask == nullptr) return nullptr;
  return dispatch_activation(operation, activation, [&](auto act) -> const char* {
    if (decltype(act)::type::kMaskable) return nullptr;
    return message("%s: expected no mask with an activation whose derivative needs more than a bit",
                   operation);
  });
}

}  // namespace batchops::cuda
