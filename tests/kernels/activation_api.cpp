// The activation functors of every instruction set, over arrays, for ctypes.
#include "kernels/common.h"
#include "kernels/cpu/simd.h"

#define BATCHOPS_ISA_BODY "activation_body.inl"
#include "kernels/cpu/for_each_isa.inl"

using namespace batchops;

// forward: dy is null. With `bits` the derivative is taken from mask bits made of z.
// `own`: 0 AnyActivation, 1 the functor itself, 2 and 3 FastSilu, exact and short. Returns 0, or 1
// where `bits` do not apply.
#define BATCHOPS_TEST_API(isa)                                                                  \
  extern "C" BATCHOPS_API int activation_##isa(int activation, double slope, int own, int bits, \
                                               int dtype, const void* dy, const void* z,        \
                                               void* out, int64_t n) {                          \
    return isa::run_activation(static_cast<Activation>(activation), slope, own, bits,           \
                               static_cast<DType>(dtype), dy, z, out, n);                       \
  }
#if defined(BATCHOPS_X86)
BATCHOPS_TEST_API(avx512)
BATCHOPS_TEST_API(avx2)
#endif
BATCHOPS_TEST_API(baseline)
