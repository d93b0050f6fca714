// Every CUDA entry point of a build without nvcc: the same symbols, so that no caller needs to know
// which build it has.
#include "kernels/batch_norm.h"
#include "kernels/group_norm.h"
#include "kernels/info.h"
#include "kernels/lamb.h"
#include "kernels/lars.h"

namespace batchops {
namespace {

constexpr const char* kNoCuda =
    "batchops was built without CUDA: CPU kernels only. Install it where nvcc is found, or set "
    "BATCHOPS_CUDA=ON to make a missing toolkit an error";

}  // namespace

bool built_with_cuda() { return false; }

const char* cuda_targets() { return ""; }

int cuda_toolkit_version() { return 0; }

int cuda_driver_version() { return 0; }

int cuda_device_count(const char** message) {
  if (message != nullptr) *message = kNoCuda;
  return 0;
}

const char* cuda_problem(int) { return kNoCuda; }

bool cuda_lock_pages(void*, size_t, int) { return false; }

bool cuda_unlock_pages(void*, int) { return false; }

bool cuda_stream_captures(void*) { return false; }

size_t batch_norm_forward_workspace_cuda(const BatchNormForward&, int) { return 0; }

size_t batch_norm_backward_workspace_cuda(const BatchNormBackward&, int) { return 0; }

const char* batch_norm_forward_cuda(const BatchNormForward&, void*, int, void*) { return kNoCuda; }

const char* batch_norm_backward_cuda(const BatchNormBackward&, void*, int, void*) {
  return kNoCuda;
}

size_t group_norm_forward_workspace_cuda(const GroupNormForward&, int) { return 0; }

size_t group_norm_backward_workspace_cuda(const GroupNormBackward&, int) { return 0; }

const char* group_norm_forward_cuda(const GroupNormForward&, void*, int, void*) { return kNoCuda; }

const char* group_norm_backward_cuda(const GroupNormBackward&, void*, int, void*) {
  return kNoCuda;
}

size_t optimizer_entries_bytes_cuda(int64_t) { return 0; }

void optimizer_describe_cuda(const OptimizerTensor*, int64_t, int32_t, void*) {}

size_t optimizer_table_bytes_cuda(const OptimizerTensor*, int64_t) { return 0; }

const char* optimizer_send_table_cuda(const OptimizerTensor*, int64_t, const void*, void*, int,
                                      void*) {
  return kNoCuda;
}

size_t grad_sum_sq_workspace_bytes_cuda(const OptimizerTensor*, int64_t) { return 0; }

const char* grad_sum_sq_cuda(const OptimizerTensor*, int64_t, const void*, void*, double*, int,
                             void*) {
  return kNoCuda;
}

size_t lamb_workspace_bytes_cuda(const LambArgs&) { return 0; }

const char* lamb_step_cuda(const LambArgs&, const void*, void*, const double*, TensorStats*, int,
                           void*) {
  return kNoCuda;
}

size_t lars_workspace_bytes_cuda(const LarsArgs&) { return 0; }

const char* lars_step_cuda(const LarsArgs&, const void*, void*, const double*, TensorStats*, int,
                           void*) {
  return kNoCuda;
}

}  // namespace batchops
