// Both walks, by layout. HxW = 1 is walked as channels_first mostly (walks_pixels()).
#pragma once
#include "kernels/cuda/group_norm_pixels.cuh"
#include "kernels/cuda/group_norm_slices.cuh"

namespace batchops::cuda::group {

template <Layout kLayout>
using WalkOf = std::conditional_t<kLayout == Layout::channels_last, Pixels, Slices>;

}  // namespace batchops::cuda::group
