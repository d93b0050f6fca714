// Types shared by batch norm's operators and its autograd.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace batchops::binding {

using at::Tensor;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;           // y, stats, mask
using BackwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dresidual, dweight, dbias

}  // namespace batchops::binding
