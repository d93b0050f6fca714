// Group norm's CUDA entry points for Python.
#include "control.h"
#include "kernels/group_norm.h"

using namespace batchops;

EMULATOR_EXPORT size_t emulated_group_norm_forward_workspace(const GroupNormForward* args) {
  return group_norm_forward_workspace_cuda(*args, 0);
}

EMULATOR_EXPORT size_t emulated_group_norm_backward_workspace(const GroupNormBackward* args) {
  return group_norm_backward_workspace_cuda(*args, 0);
}

EMULATOR_EXPORT int emulated_group_norm_forward(const GroupNormForward* args, void* workspace,
                                                char* text, size_t size) {
  return cuda_emulator::guarded(
      text, size, [&] { return group_norm_forward_cuda(*args, workspace, 0, nullptr); });
}

EMULATOR_EXPORT int emulated_group_norm_backward(const GroupNormBackward* args, void* workspace,
                                                 char* text, size_t size) {
  return cuda_emulator::guarded(
      text, size, [&] { return group_norm_backward_cuda(*args, workspace, 0, nullptr); });
}

// So that the structures mirrored in Python can be checked against these.
EMULATOR_EXPORT size_t emulated_size_of(int which) {
  constexpr size_t kSizes[] = {sizeof(GroupNormShape), sizeof(GroupNormForward),
                               sizeof(GroupNormBackward)};
  return kSizes[which];
}
