// LARS (You et al. 2017, arXiv:1708.03888) over any number of tensors.
//
//   C   = max(1, (‖g‖_all + clip_eps) / max_grad_norm)    over all tensors; 1 when off
//   g   = ±grad / (grad_scale·C)                     - when maximize
//   λ_l = trust_coeff·‖p‖ / (‖g‖ + λ·‖p‖ + eps)      1 where a norm is 0, and where not adapted
//   λ_l = min(λ_l / lr, 1)                           with trust_clip, where adapted
//   G   = λ_l·(g + λ·p)                              times lr with lr_in_momentum
//   m   = μ·m + (1 - dampening)·G                    m = G in the first step
//   p   = p - lr·m                                   without lr with lr_in_momentum;
//                                                    G + μ·m instead of m with nesterov
//
// zero_norm_plain: where a norm of an adapted tensor is 0, G = g, without decay or clip. μ of m's
// own line is times momentum_factor (momentum correction).
#pragma once
#include <cstddef>

#include "kernels/multi_tensor.h"

namespace batchops {

struct LarsGroup {
  double lr = 1;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double trust_coeff = 1e-3;
  double eps = 1e-8;
  double momentum_factor = 1;
  bool nesterov = false;
  bool trust_clip = false;
  bool always_adapt = false;
  bool exclude_decay = false;  // an excluded tensor has no weight decay either
  bool lr_in_momentum = false;
  bool zero_norm_plain = false;
  bool maximize = false;
  const double* device_rates = nullptr;  // lr and momentum_factor, as LAMB's

  constexpr bool adapted() const { return weight_decay != 0 || always_adapt; }
  constexpr double decay_of(bool excluded) const {
    return excluded && exclude_decay ? 0 : weight_decay;
  }
};

struct LarsArgs {
  const OptimizerTensor* tensors = nullptr;  // m null exactly where the group has no momentum
  int64_t tensor_count = 0;
  const LarsGroup* groups = nullptr;
  int32_t group_count = 0;
  double max_grad_norm = 0;  // 0: no clip
  double grad_scale = 1;
  DeviceNumbers device;
  int32_t sm_margin = 0;  // CUDA: multiprocessors that the step leaves to other kernels
};

// As lamb_step_cpu. u of the stats is g + λ·p, before λ_l.
BATCHOPS_API const char* lars_step_cpu(const LarsArgs& args, const double* grad_sum_sq,
                                       TensorStats* stats, const Parallel& par);

// On CUDA, as lamb_step_cuda.
BATCHOPS_API size_t lars_workspace_bytes_cuda(const LarsArgs& args);
BATCHOPS_API const char* lars_step_cuda(const LarsArgs& args, const void* table, void* workspace,
                                        const double* grad_sum_sq, TensorStats* stats, int device,
                                        void* stream);

}  // namespace batchops
