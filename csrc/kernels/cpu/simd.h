// How a CPU kernel is written once and compiled for every instruction set.
//
//   my_kernel.cpp                                   my_kernel_body.inl
//     #include "kernels/cpu/simd.h"                   template <class S> void step(…) { … }
//     #include <what the body needs>                  void my_kernel(const Args& args, …) { … }
//     #define BATCHOPS_ISA_BODY "kernels/cpu/my_kernel_body.inl"
//     #include "kernels/cpu/for_each_isa.inl"
//     void my_kernel(const Args& args) { BATCHOPS_ISA_CALL(my_kernel, args); }
//
// Large kernels include wide_isa.inl there, and baseline_isa.inl in a file of its own, which takes
// less time to compile.
//
// The body lands in namespace batchops::avx512, ::avx2 and ::baseline in turn, each time with the
// vectors of simd.inl in scope at that set's width:
//
//   Vec<float>, Vec<double>    Vec<T>::kLanes of them; + - * /, and Vec(scalar) broadcasts
//   load<T>(p), store(p, v)    p: float, double, BFloat16 or Half at any alignment
//   load<T>(p, n), store(p, v, n)   the first n lanes, 0 <= n <= kLanes; the others load as 0
//   stream(p, v)               past the cache; p aligned to kLanes * sizeof(*p); end with a fence()
//   fma, sqrt, abs, max, min, select_le, select_bits, exp, normal, sum (to double)
//
// Rules: the body includes nothing (what it needs, its .cpp includes first, so that no library code
// is compiled for a set the machine may lack), and all that touches a Vec is BATCHOPS_INLINE or in
// the body. Library templates called from the body stay at the baseline set: keep them out of inner
// loops.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
// GCC 12 takes the "undefined" operand of many AVX-512 intrinsics for a mistake, wherever they are
// inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define BATCHOPS_X86 1
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/common.h"
#include "kernels/cpu/capability.h"

#define BATCHOPS_INLINE inline __attribute__((always_inline))
#define BATCHOPS_NOINLINE __attribute__((noinline))
#define BATCHOPS_INLINE_LAMBDA __attribute__((always_inline))

namespace batchops {

// Storage only: arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace batchops

#if defined(BATCHOPS_X86)
#define BATCHOPS_ISA_CALL_AT(set, function, ...)      \
  (set == Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : set == Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                      : baseline::function(__VA_ARGS__))
#else
#define BATCHOPS_ISA_CALL_AT(set, function, ...) baseline::function(__VA_ARGS__)
#endif
#define BATCHOPS_ISA_CALL(function, ...) BATCHOPS_ISA_CALL_AT(isa(), function, __VA_ARGS__)
