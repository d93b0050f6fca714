#include <atomic>
#include <new>

#include "kernels/cpu/group_norm_plan.h"
#include "kernels/cpu/simd.h"
#include "kernels/group_norm.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/group_norm_backward_body.inl"
#include "kernels/cpu/wide_isa.inl"

namespace batchops {
namespace baseline {
const char* group_norm_backward(const GroupNormBackward& args, const Parallel& par);
}

const char* group_norm_backward_cpu(const GroupNormBackward& args, const Parallel& par) {
  if (args.shape.numel() == 0) return nullptr;
  return BATCHOPS_ISA_CALL_AT(isa_for(args.shape.dtype), group_norm_backward, args, par);
}

}  // namespace batchops
