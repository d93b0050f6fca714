// Includes BATCHOPS_ISA_BODY once for each instruction set. See simd.h.
#include "kernels/cpu/wide_isa.inl"
// clang-format off: widest first
#include "kernels/cpu/baseline_isa.inl"
