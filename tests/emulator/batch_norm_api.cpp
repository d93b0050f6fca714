// Batch norm's CUDA entry points for Python.
#include "control.h"
#include "kernels/batch_norm.h"

using namespace batchops;

namespace batchops::cuda {
extern bool keep_on_chip;
extern int spared_multiprocessors;
}  // namespace batchops::cuda

EMULATOR_EXPORT size_t emulated_batch_norm_forward_workspace(const BatchNormForward* args) {
  return batch_norm_forward_workspace_cuda(*args, 0);
}

EMULATOR_EXPORT size_t emulated_batch_norm_backward_workspace(const BatchNormBackward* args) {
  return batch_norm_backward_workspace_cuda(*args, 0);
}

EMULATOR_EXPORT int emulated_batch_norm_forward(const BatchNormForward* args, void* workspace,
                                                char* text, size_t size) {
  return cuda_emulator::guarded(
      text, size, [&] { return batch_norm_forward_cuda(*args, workspace, 0, nullptr); });
}

EMULATOR_EXPORT int emulated_batch_norm_backward(const BatchNormBackward* args, void* workspace,
                                                 char* text, size_t size) {
  return cuda_emulator::guarded(
      text, size, [&] { return batch_norm_backward_cuda(*args, workspace, 0, nullptr); });
}

// As BATCHOPS_CUDA_RESIDENT in the environment of a process does.
EMULATOR_EXPORT void emulated_batch_norm_keep(bool on_chip) { cuda::keep_on_chip = on_chip; }

// As BATCHOPS_CUDA_SM_MARGIN does.
EMULATOR_EXPORT void emulated_batch_norm_spare(int multiprocessors) {
  cuda::spared_multiprocessors = multiprocessors;
}

// So that the structures mirrored in Python can be checked against these.
EMULATOR_EXPORT size_t emulated_size_of(int which) {
  constexpr size_t kSizes[] = {sizeof(BatchNormShape), sizeof(BatchNormForward),
                               sizeof(BatchNormBackward)};
  return kSizes[which];
}
