// The instruction set the CPU kernels run with, chosen once a process.
#pragma once
#include <cstdint>

#include "kernels/common.h"

namespace batchops {

// avx512 is x86-64-v4 (F, BW, CD, DQ, VL), avx2 is x86-64-v3 (with FMA and F16C). baseline is
// whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
enum class Isa : int32_t { baseline = 0, avx2 = 1, avx512 = 2 };

// The best one this machine has, or the lower one that the environment variable
// BATCHOPS_CPU_CAPABILITY names ("avx512", "avx2", "default"). A name this machine cannot run gives
// the best it can; an unknown name is reported once on stderr and ignored.
Isa isa();

// Whether isa() is avx512 and the machine also converts to bfloat16 by itself.
extern const bool has_avx512_bf16;

// The set that kernels over elements of this dtype run with. avx512 is for float and bfloat16
// alone: each instance costs time to compile.
inline Isa isa_for(DType dtype) {
  const bool wide = dtype == DType::f32 || dtype == DType::bf16;
  return isa() == Isa::avx512 && !wide ? Isa::avx2 : isa();
}

}  // namespace batchops
