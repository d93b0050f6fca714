// What lamb.cpp asks of one chunk of one tensor; written in lamb_body.inl for every instruction
// set.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/lamb_factors.h"

namespace batchops {

// Elements [begin, begin + count) of a tensor.
struct LambChunk {
  const LambTensor* tensor = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
};

struct LambNorms {
  double p_sq = 0;  // Σ p²
  double u_sq = 0;  // Σ (u / scale)²
};

#define BATCHOPS_LAMB_CHUNK_FUNCTIONS                                                      \
  double lamb_grad_sq(const LambChunk& chunk);                                             \
  /* m, v = …; the norms are added to *norms unless it is null */                          \
  void lamb_moments(const LambChunk& chunk, const LambFactors& factors, LambNorms* norms); \
  /* p -= …, u formed from the stored m and v */                                           \
  void lamb_apply(const LambChunk& chunk, const LambFactors& factors, const LambStepFactors& step);

#if defined(BATCHOPS_X86)
namespace avx512 {
BATCHOPS_LAMB_CHUNK_FUNCTIONS
}
namespace avx2 {
BATCHOPS_LAMB_CHUNK_FUNCTIONS
}
#endif
namespace baseline {
BATCHOPS_LAMB_CHUNK_FUNCTIONS
}
#undef BATCHOPS_LAMB_CHUNK_FUNCTIONS

}  // namespace batchops
