// LAMB (You et al. 2020, arXiv:1904.00962) over any number of tensors, on CPU and CUDA.
//
//   C = max(1, ‖g‖_all / max_grad_norm)          over all tensors of the optimizer; 1 when off
//   g = ±grad / C                                 - when maximize
//   m = β1·m + β3·g,    v = β2·v + (1 - β2)·g²    β3 = 1 - β1 with grad_averaging, else 1
//   u = (m / bc1) / (sqrt(v / bc2) + eps) + λ·p   bc = 1 - β^t with bias_correction, else 1
//   r = ‖p‖ / ‖u‖ if adapted, else 1              1 where a norm is 0; ≤ 1 with trust_clip
//   p = p - lr·r·u
//
// A NaN or infinite norm is not hidden: it reaches p.
#pragma once
#include <cmath>
#include <cstddef>

#include "kernels/common.h"

namespace batchops {

// Hyperparameters of one parameter group.
struct LambGroup {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-6;
  double weight_decay = 0.01;
  bool bias_correction = true;
  bool grad_averaging = true;
  bool trust_clip = false;
  bool always_adapt = false;
  bool maximize = false;

  bool adapted() const { return weight_decay != 0 || always_adapt; }
};

// One parameter. p, g, m and v hold `numel` elements each, and element i of one belongs to element
// i of the others: who calls has made the four memory layouts equal.
struct LambTensor {
  void* p = nullptr;
  const void* g = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  int64_t numel = 0;
  DType p_dtype = DType::f32;  // f32, f16 or bf16; the same for g
  DType g_dtype = DType::f32;
  int32_t group = 0;
  double step = 1;  // t, this step included
};

struct LambArgs {
  const LambTensor* tensors = nullptr;
  int64_t tensor_count = 0;
  const LambGroup* groups = nullptr;
  int32_t group_count = 0;
  double max_grad_norm = 0;  // 0: no clip
};

// Σ grad² over all tensors, in double and in an order that depends on the shapes only.
BATCHOPS_API const char* lamb_grad_sum_sq_cpu(const LambArgs& args, double* sum_sq,
                                              const Parallel& par);

// One step. `grad_sum_sq` is Σ grad² over every tensor the clip is to count, also those of other
// calls; null: this call's own. The same bits come out for any number of threads. Returns null, or
// a message; nothing has been written then.
BATCHOPS_API const char* lamb_step_cpu(const LambArgs& args, const double* grad_sum_sq,
                                       const Parallel& par);

// On CUDA the kernels read the tensors from a table in device memory. It depends on what LambArgs
// says of the tensors, `step` only as far as tensors of a group have different ones, and not on
// groups and max_grad_norm: so it lives on from step to step while the pointers stay.
// write_table fills `table`, lamb_table_bytes_cuda(args) bytes of host memory.
BATCHOPS_API size_t lamb_table_bytes_cuda(const LambArgs& args);
BATCHOPS_API void lamb_write_table_cuda(const LambArgs& args, void* table);

// `table` is a copy in device memory, 16-byte aligned, of what lamb_write_table_cuda makes of these
// args. The workspace belongs to the call: any content, 16-byte aligned, of at least so many bytes;
// it may be freed in stream order as soon as the call returns. The current device must be `device`
// already in the framework's eyes; it is set again for the statically linked runtime. Nothing waits
// for the device. The sum, one double, and the clip that comes of it stay on the device.
BATCHOPS_API size_t lamb_workspace_bytes_cuda(const LambArgs& args);
BATCHOPS_API const char* lamb_grad_sum_sq_cuda(const LambArgs& args, const void* table,
                                               void* workspace, double* sum_sq, int device,
                                               void* stream);
BATCHOPS_API const char* lamb_step_cuda(const LambArgs& args, const void* table, void* workspace,
                                        const double* grad_sum_sq, int device, void* stream);

}  // namespace batchops
