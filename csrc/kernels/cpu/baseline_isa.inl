// Includes BATCHOPS_ISA_BODY for the baseline set. See simd.h.
namespace batchops::baseline {
#include "kernels/cpu/simd.inl"
// clang-format off
#include BATCHOPS_ISA_BODY
// clang-format on
}  // namespace batchops::baseline
