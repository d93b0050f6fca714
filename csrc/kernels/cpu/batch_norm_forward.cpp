#include <atomic>
#include <new>

#include "kernels/batch_norm.h"
#include "kernels/cpu/batch_norm_plan.h"
#include "kernels/cpu/simd.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/batch_norm_forward_body.inl"
#include "kernels/cpu/wide_isa.inl"

namespace batchops {
namespace baseline {
const char* batch_norm_forward(const BatchNormForward& args, const Parallel& par);
}

const char* batch_norm_forward_cpu(const BatchNormForward& args, const Parallel& par) {
  if (args.shape.numel() == 0) return nullptr;
  if (!args.training && (args.running_mean == nullptr || args.running_var == nullptr)) {
    return "batch_norm: running_mean and running_var are needed in evaluation, got null";
  }
  return BATCHOPS_ISA_CALL_AT(isa_for(args.shape.dtype), batch_norm_forward, args, par);
}

}  // namespace batchops
