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
  // On CUDA, of all tensors or of none: the steps before this one, which the kernels count on.
  // `step` is then 1.
  float* device_step = nullptr;
};

// Numbers of a step that are on the device (CUDA only); null where the host has them.
struct DeviceNumbers {
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;  // not 0: nothing changes, step counts included
};

// What a step has seen of one tensor. The gradient's norm is taken before the clip.
struct TensorStats {
  float p_norm, g_norm, u_norm, ratio;
};

// Σ grad² over all tensors, in double and in an order that depends on the shapes only.
BATCHOPS_API const char* grad_sum_sq_cpu(const OptimizerTensor* tensors, int64_t tensor_count,
                                         double* sum_sq, const Parallel& par);

// On CUDA the kernels read the tensors from a table in device memory, 16-byte aligned. It depends
// on the tensors alone, and on `step` only as far as tensors of a group have different ones: so it
// lives on from step to step while its entries, which describe_cuda writes to host memory, stay the
// same. send_table travels as kernel arguments: in the order of the stream, into a captured graph
// too, and without host memory that would have to stay. The current device must be `device` already
// in the framework's eyes; it is set again for the statically linked runtime.
BATCHOPS_API size_t optimizer_entries_bytes_cuda(int64_t tensor_count);
BATCHOPS_API void optimizer_describe_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                                          int32_t group_count, void* entries);
BATCHOPS_API size_t optimizer_table_bytes_cuda(const OptimizerTensor* tensors,
                                               int64_t tensor_count);
BATCHOPS_API const char* optimizer_send_table_cuda(const OptimizerTensor* tensors,
                                                   int64_t tensor_count, const void* entries,
                                                   void* table, int device, void* stream);

// `table` is that of these tensors. The workspace belongs to the call: any content, 16-byte
// aligned, of at least so many bytes; it may be freed in stream order as soon as the call returns.
// Nothing waits for the device, and the sum stays there. So it is with the steps too.
BATCHOPS_API size_t grad_sum_sq_workspace_bytes_cuda(const OptimizerTensor* tensors,
                                                     int64_t tensor_count);
BATCHOPS_API const char* grad_sum_sq_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                                          const void* table, void* workspace, double* sum_sq,
                                          int device, void* stream);

}  // namespace batchops
