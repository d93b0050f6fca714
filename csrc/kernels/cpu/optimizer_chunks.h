// What the optimizers ask of one chunk of one tensor; written in *_body.inl for every instruction
// set.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/lamb_factors.h"
#include "kernels/lars_factors.h"

namespace batchops {

// Elements [begin, begin + count) of a tensor.
struct OptimizerChunk {
  const OptimizerTensor* tensor = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
};

#define BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS                                                  \
  double grad_sq(const OptimizerChunk& chunk);                                              \
  /* m, v = …; the sums are added to norms */                                               \
  void lamb_moments(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,  \
                    LambNorms& norms);                                                      \
  /* p -= …, u formed from the stored m and v */                                            \
  void lamb_apply(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,    \
                  const LambStepFactors& step);                                             \
  /* of g times `scale` */                                                                  \
  void lars_norms(const OptimizerChunk& chunk, float scale, float decay, LarsNorms& norms); \
  void lars_apply(const OptimizerChunk& chunk, const LarsFactors& factors);

#if defined(BATCHOPS_X86)
namespace avx512 {
BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS
}
namespace avx2 {
BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS
}
#endif
namespace baseline {
BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS
}
#undef BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS

}  // namespace batchops
