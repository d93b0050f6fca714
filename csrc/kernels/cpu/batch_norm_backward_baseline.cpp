#include <atomic>
#include <new>

#include "kernels/batch_norm.h"
#include "kernels/cpu/batch_norm_plan.h"
#include "kernels/cpu/simd.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/batch_norm_backward_body.inl"
#include "kernels/cpu/baseline_isa.inl"
