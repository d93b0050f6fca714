// LAMB's CUDA entry points for Python, each tensor a row of numbers.
#include <vector>

#include "control.h"
#include "kernels/lamb.h"

using namespace batchops;

namespace {

// numbers: [groups, 8] and flags: [groups], bits, the fields of LambGroup in their order.
struct Call {
  int64_t tensor_count;
  const int64_t* tensors;  // [tensors, 10]: p, g, m, v, master, numel, p dtype, g dtype, group,
                           // excluded
  const double* steps;     // [tensors]
  int64_t group_count;
  const double* numbers;
  const int64_t* flags;
  double max_grad_norm, clip_eps, grad_scale;
};

struct Unpacked {
  std::vector<OptimizerTensor> tensors;
  std::vector<LambGroup> groups;
  LambArgs args;

  explicit Unpacked(const Call& call) {
    for (int64_t i = 0; i < call.tensor_count; ++i) {
      const int64_t* row = call.tensors + 10 * i;
      OptimizerTensor x;
      x.p = reinterpret_cast<void*>(row[0]);
      x.g = reinterpret_cast<const void*>(row[1]);
      x.m = reinterpret_cast<float*>(row[2]);
      x.v = reinterpret_cast<float*>(row[3]);
      x.master = reinterpret_cast<float*>(row[4]);
      x.numel = row[5];
      x.p_dtype = static_cast<DType>(row[6]);
      x.g_dtype = static_cast<DType>(row[7]);
      x.group = static_cast<int32_t>(row[8]);
      x.excluded = static_cast<int32_t>(row[9]);
      x.step = call.steps[i];
      tensors.push_back(x);
    }
    for (int64_t i = 0; i < call.group_count; ++i) {
      const double* n = call.numbers + 8 * i;
      const auto flag = [&](int bit) { return ((call.flags[i] >> bit) & 1) != 0; };
      groups.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], flag(0), flag(1), flag(2),
                        flag(3), flag(4), flag(5), flag(6), flag(7)});
    }
    args.tensors = tensors.data();
    args.tensor_count = static_cast<int64_t>(tensors.size());
    args.groups = groups.data();
    args.group_count = static_cast<int32_t>(groups.size());
    args.max_grad_norm = call.max_grad_norm;
    args.clip_eps = call.clip_eps;
    args.grad_scale = call.grad_scale;
  }
};

}  // namespace

EMULATOR_EXPORT size_t emulated_lamb_table_bytes(const Call* call) {
  return lamb_table_bytes_cuda(Unpacked(*call).args);
}

EMULATOR_EXPORT size_t emulated_lamb_workspace_bytes(const Call* call) {
  return lamb_workspace_bytes_cuda(Unpacked(*call).args);
}

// One step; `grad_sum_sq` and `stats` may be null. `table` and `workspace` are of the sizes above.
EMULATOR_EXPORT int emulated_lamb_step(const Call* call, void* table, void* workspace,
                                       const double* grad_sum_sq, TensorStats* stats, char* text,
                                       size_t size) {
  return cuda_emulator::guarded(text, size, [&] {
    const Unpacked unpacked(*call);
    lamb_write_table_cuda(unpacked.args, table);
    return lamb_step_cuda(unpacked.args, table, workspace, grad_sum_sq, stats, 0, nullptr);
  });
}

EMULATOR_EXPORT int emulated_lamb_grad_sum_sq(const Call* call, void* table, void* workspace,
                                              double* sum_sq, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&] {
    const Unpacked unpacked(*call);
    lamb_write_table_cuda(unpacked.args, table);
    return lamb_grad_sum_sq_cuda(unpacked.args, table, workspace, sum_sq, 0, nullptr);
  });
}
