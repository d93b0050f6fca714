#include <atomic>
#include <new>

#include "kernels/cpu/group_norm_plan.h"
#include "kernels/cpu/simd.h"
#include "kernels/group_norm.h"

#define BATCHOPS_ISA_BODY "kernels/cpu/group_norm_forward_body.inl"
#include "kernels/cpu/baseline_isa.inl"
