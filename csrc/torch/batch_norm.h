// Types shared by batch norm's operators and its autograd.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "kernels/common.h"

namespace batchops::binding {

using at::Tensor;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;  // y, stats, mask
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dresidual, dweight, dbias

// The bit mask of kernels/batch_norm.h as a tensor. Its number of dimensions says which layout it
// was written for, since a backward may see the input in another one (saved-tensor hooks):
//   channels_first: [N, C, ceil(HxW / 8)]     channels_last: [N * HxW, ceil(C / 8)]
inline Layout layout_of_mask(const Tensor& mask) {
  return mask.dim() == 3 ? Layout::channels_first : Layout::channels_last;
}

}  // namespace batchops::binding
