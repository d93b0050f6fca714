// The optimizers' CUDA entry points for Python, each tensor a row of numbers.
#include <cuda_runtime_api.h>

#include <vector>

#include "control.h"
#include "kernels/lamb.h"
#include "kernels/lars.h"

using namespace batchops;

namespace {

// numbers: [groups, 8 or 7] and flags: [groups], bits, the fields of LambGroup or LarsGroup in
// their order.
struct Call {
  int64_t tensor_count;
  const int64_t* tensors;  // [tensors, 11]: p, g, m, v, master, numel, p dtype, g dtype, group,
                           // excluded, device step
  const double* steps;     // [tensors]
  int64_t group_count;
  const double* numbers;
  const int64_t* flags;
  const double* const* rates;  // [groups]
  double max_grad_norm, clip_eps, grad_scale;
  const float* device_grad_scale;
  const float* found_inf;
  int64_t sm_margin;
};

std::vector<OptimizerTensor> tensors_of(const Call& call) {
  std::vector<OptimizerTensor> tensors;
  for (int64_t i = 0; i < call.tensor_count; ++i) {
    const int64_t* row = call.tensors + 11 * i;
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
    x.device_step = reinterpret_cast<float*>(row[10]);
    tensors.push_back(x);
  }
  return tensors;
}

template <class Group, class Args>
struct Unpacked {
  std::vector<OptimizerTensor> tensors;
  std::vector<Group> groups;
  Args args;

  explicit Unpacked(const Call& call) : tensors(tensors_of(call)) {
    for (int64_t i = 0; i < call.group_count; ++i) {
      add(call, i);
      groups.back().device_rates = call.rates[i];
    }
    args.tensors = tensors.data();
    args.tensor_count = static_cast<int64_t>(tensors.size());
    args.groups = groups.data();
    args.group_count = static_cast<int32_t>(groups.size());
    args.max_grad_norm = call.max_grad_norm;
    args.grad_scale = call.grad_scale;
    args.device = {call.device_grad_scale, call.found_inf};
    args.sm_margin = static_cast<int32_t>(call.sm_margin);
  }
  void add(const Call& call, int64_t i);
};

using Lamb = Unpacked<LambGroup, LambArgs>;
template <>
void Lamb::add(const Call& call, int64_t i) {
  const double* n = call.numbers + 8 * i;
  const auto flag = [&](int bit) { return ((call.flags[i] >> bit) & 1) != 0; };
  groups.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], flag(0), flag(1), flag(2),
                    flag(3), flag(4), flag(5), flag(6), flag(7)});
  args.clip_eps = call.clip_eps;
}

using Lars = Unpacked<LarsGroup, LarsArgs>;
template <>
void Lars::add(const Call& call, int64_t i) {
  const double* n = call.numbers + 7 * i;
  const auto flag = [&](int bit) { return ((call.flags[i] >> bit) & 1) != 0; };
  groups.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], flag(0), flag(1), flag(2), flag(3),
                    flag(4), flag(5), flag(6)});
}

const char* send_table(const Call& call, void* table, void* stream) {
  const std::vector<OptimizerTensor> tensors = tensors_of(call);
  std::vector<unsigned char> entries(optimizer_entries_bytes_cuda(call.tensor_count));
  optimizer_describe_cuda(tensors.data(), call.tensor_count, static_cast<int32_t>(call.group_count),
                          entries.data());
  return optimizer_send_table_cuda(tensors.data(), call.tensor_count, entries.data(), table, 0,
                                   stream);
}

}  // namespace

EMULATOR_EXPORT size_t emulated_table_bytes(const Call* call) {
  return optimizer_table_bytes_cuda(tensors_of(*call).data(), call->tensor_count);
}

EMULATOR_EXPORT size_t emulated_lamb_workspace_bytes(const Call* call) {
  return lamb_workspace_bytes_cuda(Lamb(*call).args);
}

EMULATOR_EXPORT size_t emulated_lars_workspace_bytes(const Call* call) {
  return lars_workspace_bytes_cuda(Lars(*call).args);
}

// One step; `grad_sum_sq` and `stats` may be null. `table` and `workspace` are of the sizes above.
EMULATOR_EXPORT int emulated_lamb_step(const Call* call, void* table, void* workspace,
                                       const double* grad_sum_sq, TensorStats* stats, char* text,
                                       size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    if (const char* error = send_table(*call, table, nullptr)) return error;
    return lamb_step_cuda(Lamb(*call).args, table, workspace, grad_sum_sq, stats, 0, nullptr);
  });
}

EMULATOR_EXPORT int emulated_lars_step(const Call* call, void* table, void* workspace,
                                       const double* grad_sum_sq, TensorStats* stats, char* text,
                                       size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    if (const char* error = send_table(*call, table, nullptr)) return error;
    return lars_step_cuda(Lars(*call).args, table, workspace, grad_sum_sq, stats, 0, nullptr);
  });
}

// A LAMB step of each call, in a stream of its own: tables[i], workspaces[i].
EMULATOR_EXPORT int emulated_lamb_steps_in_streams(int64_t count, const Call* const* calls,
                                                   void* const* tables, void* const* workspaces,
                                                   char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (int64_t i = 0; i < count; ++i) {
      cudaStream_t stream;
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      const char* error = send_table(*calls[i], tables[i], stream);
      if (error == nullptr)
        error = lamb_step_cuda(Lamb(*calls[i]).args, tables[i], workspaces[i], nullptr, nullptr, 0,
                               stream);
      cudaStreamDestroy(stream);  // once its work is done
      if (error != nullptr) return error;
    }
    return nullptr;
  });
}

EMULATOR_EXPORT size_t emulated_grad_sum_sq_workspace_bytes(const Call* call) {
  return grad_sum_sq_workspace_bytes_cuda(tensors_of(*call).data(), call->tensor_count);
}

EMULATOR_EXPORT int emulated_grad_sum_sq(const Call* call, void* table, void* workspace,
                                         double* sum_sq, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    const std::vector<OptimizerTensor> tensors = tensors_of(*call);
    if (const char* error = send_table(*call, table, nullptr)) return error;
    return grad_sum_sq_cuda(tensors.data(), call->tensor_count, table, workspace, sum_sq, 0,
                            nullptr);
  });
}
