// What the optimizers share: the tensors of a step, and the sum that clips their gradients.
#pragma once
#include <cstddef>

#include "kernels/common.h"

namespace batchops {

// One parameter. All arrays hold `numel` elements, and element i of one belongs to element i of the
// others: who calls has made their memory layouts equal.
struct OptimizerTensor {
  void* p = nullptr;
  const void* g = nullptr;
  float* m = nullptr;       // LARS without momentum: null
  float* v = nullptr;       // LAMB only
  float* master = nullptr;  // p in float32, of which p is then the rounded copy; or null
  int64_t numel = 0;
  DType p_dtype = DType::f32;  // f32, f16 or bf16; the same for g
  DType g_dtype = DType::f32;
  int32_t group = 0;
  int32_t excluded = 0;  // takes no trust ratio
  double step = 1;       // t, this step included
};

// What a step has seen of one tensor. The gradient's norm is taken before the clip.
struct TensorStats {
  float p_norm, g_norm, u_norm, ratio;
};

// Σ grad² over all tensors, in double and in an order that depends on the shapes only.
BATCHOPS_API const char* grad_sum_sq_cpu(const OptimizerTensor* tensors, int64_t tensor_count,
                                         double* sum_sq, const Parallel& par);

}  // namespace batchops
