// LAMB (You et al. 2020, arXiv:1904.00962) over any number of tensors, on CPU and CUDA.
//
// clang-format off
//   C = max(1, (‖g‖_all + clip_eps) / max_grad_norm)    over all tensors of the optimizer; 1 when off
//   g = ±grad / (grad_scale·C)                          - when maximize
//   m = β1·m + β3·g,    v = β2·v + (1 - β2)·g²          β3 = 1 - β1 with grad_averaging, else 1
//   a = (m / bc1) / (sqrt(v / bc2) + eps)               bc = 1 - β^t with bias_correction, else 1
//   a = a·[m·g > 0] / max(mean([m·g > 0]), 1e-3)        with caution
//   u = a + λ·p                                         decoupled_decay: p *= 1 - decay_lr·λ instead
//   r = clamp(‖p‖ / ‖u‖, ratio_min, ratio_max)          1 where a norm is 0, and where not adapted
//   p = p - lr·r·u
// clang-format on
//
// eps_inside_sqrt: sqrt(v / bc2 + eps). step_size_correction: bc1 and bc2 are 1 in a, and lr takes
// their place, lr·sqrt(bc2) / bc1. A NaN or infinite norm is not hidden: it reaches p.
#pragma once
#include <cmath>
#include <cstddef>
#include <limits>

#include "kernels/multi_tensor.h"

namespace batchops {

// Hyperparameters of one parameter group.
struct LambGroup {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-6;
  double weight_decay = 0.01;
  double decay_lr = 1e-3;  // decoupled_decay: what multiplies weight_decay
  double ratio_min = 0;
  double ratio_max = std::numeric_limits<double>::infinity();
  bool bias_correction = true;
  bool grad_averaging = true;
  bool always_adapt = false;
  bool maximize = false;
  bool decoupled_decay = false;
  bool caution = false;
  bool step_size_correction = false;
  bool eps_inside_sqrt = false;
  const double* device_rates = nullptr;  // lr and decay_lr where device_step counts, or null

  constexpr bool adapted() const { return weight_decay != 0 || always_adapt; }
};

struct LambArgs {
  const OptimizerTensor* tensors = nullptr;
  int64_t tensor_count = 0;
  const LambGroup* groups = nullptr;
  int32_t group_count = 0;
  double max_grad_norm = 0;  // 0: no clip
  double clip_eps = 0;
  double grad_scale = 1;
  DeviceNumbers device;
  int32_t sm_margin = 0;  // CUDA: multiprocessors that the step leaves to other kernels
};

// One step. `grad_sum_sq` is Σ grad² over every tensor the clip is to count, also those of other
// calls; null: this call's own. `stats` holds an entry for each tensor, or is null. The same bits
// come out for any number of threads. Returns null, or a message; nothing has been written then.
BATCHOPS_API const char* lamb_step_cpu(const LambArgs& args, const double* grad_sum_sq,
                                       TensorStats* stats, const Parallel& par);

// On CUDA, as grad_sum_sq_cuda. The sum, the clip that comes of it and the stats stay on the
// device.
BATCHOPS_API size_t lamb_workspace_bytes_cuda(const LambArgs& args);
BATCHOPS_API const char* lamb_step_cuda(const LambArgs& args, const void* table, void* workspace,
                                        const double* grad_sum_sq, TensorStats* stats, int device,
                                        void* stream);

}  // namespace batchops
