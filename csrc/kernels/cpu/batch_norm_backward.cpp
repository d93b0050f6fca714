#include <atomic>
#include <new>

#include "kernels/batch_norm.h"
#include "kernels/cpu/batch_norm_plan.h"
#include "kernels/cpu/simd.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/batch_norm_backward_body.inl"
#include "kernels/cpu/wide_isa.inl"

namespace batchops {
namespace baseline {
const char* batch_norm_backward(const BatchNormBackward& args, const Parallel& par);
}

const char* batch_norm_backward_cpu(const BatchNormBackward& args, const Parallel& par) {
  if (args.shape.numel() == 0) return nullptr;
  return BATCHOPS_ISA_CALL_AT(isa_for(args.shape.dtype), batch_norm_backward, args, par);
}

}  // namespace batchops
