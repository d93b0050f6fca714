#include <atomic>
#include <new>

#include "kernels/cpu/group_norm_plan.h"
#include "kernels/cpu/simd.h"
#include "kernels/group_norm.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/group_norm_forward_body.inl"
#include "kernels/cpu/wide_isa.inl"

namespace batchops {
namespace baseline {
const char* group_norm_forward(const GroupNormForward& args, const Parallel& par);
}

const char* group_norm_forward_cpu(const GroupNormForward& args, const Parallel& par) {
  if (args.shape.numel() == 0) return nullptr;
  return BATCHOPS_ISA_CALL_AT(isa_for(args.shape.dtype), group_norm_forward, args, par);
}

}  // namespace batchops
