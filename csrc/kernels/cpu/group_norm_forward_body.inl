// The forward for one instruction set. See simd.h for how this is compiled, and group_norm_plan.h
// for how a tensor is cut.
// clang-format off: the order matters
#include "kernels/activation.inl"
#include "kernels/cpu/silu.inl"
#include "kernels/cpu/norm_common.inl"
#include "kernels/cpu/pairs.inl"
#include "kernels/cpu/group_norm_common.inl"
#include "kernels/cpu/group_norm_statistics.inl"
#include "kernels/cpu/group_norm_forward.inl"
