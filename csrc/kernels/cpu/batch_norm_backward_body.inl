// The backward for one instruction set. See simd.h for how this is compiled, and batch_norm_plan.h
// for how a tensor is cut.
// clang-format off: the order matters
#include "kernels/activation.inl"
#include "kernels/cpu/norm_common.inl"
#include "kernels/cpu/pairs.inl"
#include "kernels/cpu/batch_norm_common.inl"
#include "kernels/cpu/batch_norm_backward.inl"
