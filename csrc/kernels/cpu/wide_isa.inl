// Includes BATCHOPS_ISA_BODY once for each instruction set above the baseline. See simd.h.
//
// The target is set by pragma for exactly this text, not by compiler flags for the file: a library
// function instantiated here would otherwise be compiled for AVX-512 and, being weak, could replace
// the one that the rest of the process uses on a machine without it. Features are named one by one,
// not as arch=x86-64-v4, because GCC inlines baseline functions only where the architecture is the
// same.
#if defined(BATCHOPS_X86)

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2," \
                          "lzcnt,popcnt"))),                                                    \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
#endif
#define BATCHOPS_ISA_AVX512 1
namespace batchops::avx512 {
#include "kernels/cpu/simd.inl"
// clang-format off
#include BATCHOPS_ISA_BODY
// clang-format on
}  // namespace batchops::avx512
#undef BATCHOPS_ISA_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#endif
#define BATCHOPS_ISA_AVX2 1
namespace batchops::avx2 {
#include "kernels/cpu/simd.inl"
// clang-format off
#include BATCHOPS_ISA_BODY
// clang-format on
}  // namespace batchops::avx2
#undef BATCHOPS_ISA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
