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

// What a thread reads next, to be on its way while the caches have all it works on.
struct Ahead {
  const char* p = nullptr;
  const char* g = nullptr;
  int64_t p_bytes = 0, g_bytes = 0;  // an element
  int64_t count = 0;

  Ahead() = default;
  explicit Ahead(const OptimizerChunk& chunk) : count(chunk.count) {
    const OptimizerTensor& x = *chunk.tensor;
    p_bytes = x.master != nullptr ? 4 : size_of(x.p_dtype);
    g_bytes = size_of(x.g_dtype);
    p = static_cast<const char*>(x.master != nullptr ? x.master : x.p) + chunk.begin * p_bytes;
    g = static_cast<const char*>(x.g) + chunk.begin * g_bytes;
  }
};

#define BATCHOPS_OPTIMIZER_CHUNK_FUNCTIONS                                                        \
  double grad_sq(const OptimizerChunk& chunk);                                                    \
  /* m, v = …; the sums are added to norms; m / (sqrt(v) + eps) is kept where that is not null */ \
  void lamb_moments(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,        \
                    float* quotients, LambNorms& norms);                                          \
  /* p -= …, u from what was kept or formed from the stored m and v: the same bits */             \
  void lamb_apply(const OptimizerChunk& chunk, const LambFactors& factors, bool caution,          \
                  const LambStepFactors& step, const float* quotients, const Ahead& ahead);       \
  /* of g times `scale` */                                                                        \
  void lars_norms(const OptimizerChunk& chunk, float scale, float decay, LarsNorms& norms);       \
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
