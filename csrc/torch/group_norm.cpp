// torch.ops.batchops.group_norm and layer_norm: schemas, checks, allocation and launch; autograd in
// norm_autograd.cpp.
#include <ATen/ops/_unsafe_view.h>
#include <torch/library.h>

#include <vector>

#include "kernels/group_norm.h"
#include "torch/activation.h"
#include "torch/norm.h"

namespace batchops::binding {
namespace {

constexpr const char* kGroupNorm = "group_norm";

void check_groups(const char* op, const Tensor& input, int64_t num_groups) {
  TORCH_CHECK(num_groups > 0, op, ": Expected num groups to be greater than 0, got ", num_groups);
  TORCH_CHECK(input.sym_size(1) % num_groups == 0, op,
              ": Expected number of channels in input to be divisible by num_groups, but got input "
              "of shape ",
              input.sym_sizes(), " and num_groups=", num_groups);
}

ForwardOutputs forward(const Tensor& input, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                       std::string_view activation, double slope, bool save_mask,
                       const OptionalTensor& stats) {
  const NormForwardCall call{kGroupNorm, input,    weight,
                             bias,       residual, parse_activation(kGroupNorm, activation),
                             slope,      save_mask};
  check_norm_input(kGroupNorm, input);
  check_groups(kGroupNorm, input, num_groups);
  check_affine(kGroupNorm, input, weight, bias);
  check_residual(kGroupNorm, input, residual);
  NormForwardTensors tensors(call, input.size(0) * num_groups, stats);
  if (input.numel() == 0) return tensors.outputs();
  GroupNormForward args;
  args.shape = norm_shape<GroupNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.shape.G = num_groups;
  args.have_stats = stats.has_value();
  args.eps = eps;
  tensors.fill(args);
  launch(kGroupNorm, input, args, group_norm_forward_cpu, group_norm_forward_workspace_cuda,
         group_norm_forward_cuda);
  return tensors.outputs();
}

ForwardOutputs group_norm(const Tensor& input, int64_t num_groups, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                          std::string_view activation, double slope, bool save_mask) {
  return forward(input, num_groups, weight, bias, residual, eps, activation, slope, save_mask, {});
}

Tensor group_norm_apply(const Tensor& input, const Tensor& stats, int64_t num_groups,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, std::string_view activation, double slope) {
  return std::get<0>(
      forward(input, num_groups, weight, bias, residual, 0, activation, slope, false, stats));
}

BackwardOutputs group_norm_backward(const Tensor& dy, const Tensor& input,
                                    const OptionalTensor& residual, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& stats,
                                    const OptionalTensor& mask, int64_t num_groups, double eps,
                                    std::string_view activation, double slope,
                                    std::array<bool, 4> output_mask) {
  (void)eps;  // only the derivative of this operator needs it
  constexpr const char* op = "group_norm_backward";
  const NormBackwardCall call{op,       dy,         input,
                              residual, weight,     bias,
                              stats,    mask,       parse_activation(op, activation),
                              slope,    output_mask};
  check_groups(op, input, num_groups);
  call.check(input.size(0) * num_groups);
  NormBackwardTensors tensors(call);
  if (tensors.done) return tensors.outputs();
  GroupNormBackward args;
  args.shape = norm_shape<GroupNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.shape.G = num_groups;
  tensors.fill(args, call);
  launch(op, input, args, group_norm_backward_cpu, group_norm_backward_workspace_cuda,
         group_norm_backward_cuda);
  return tensors.outputs();
}

ForwardOutputs group_norm_meta(const Tensor& input, int64_t num_groups,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& residual, double, std::string_view activation,
                               double slope, bool save_mask) {
  const NormForwardCall call{kGroupNorm, input,    weight,
                             bias,       residual, parse_activation(kGroupNorm, activation),
                             slope,      save_mask};
  check_norm_input(kGroupNorm, input);
  check_groups(kGroupNorm, input, num_groups);
  check_affine(kGroupNorm, input, weight, bias);
  check_residual(kGroupNorm, input, residual);
  return norm_forward_meta(call, input.sym_size(0) * num_groups);
}

Tensor group_norm_apply_meta(const Tensor& input, const Tensor&, int64_t num_groups,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& residual, std::string_view activation,
                             double slope) {
  return std::get<0>(
      group_norm_meta(input, num_groups, weight, bias, residual, 0, activation, slope, false));
}

BackwardOutputs group_norm_backward_meta(const Tensor&, const Tensor& input, const OptionalTensor&,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor&, const OptionalTensor&, int64_t, double,
                                         std::string_view, double,
                                         std::array<bool, 4> output_mask) {
  return norm_backward_meta(input, weight, bias, output_mask);
}

// A group of all channels over a (rows, values) view; each value is a channel.
ForwardOutputs layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, double eps, std::string_view activation,
                          double slope) {
  constexpr const char* op = "layer_norm";
  const auto sizes = input.sym_sizes();
  const auto dims = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(dims >= 1, op,
              ": Expected normalized_shape to be at least 1-dimensional, i.e., containing at least "
              "one element, but got normalized_shape = ",
              normalized_shape);
  const bool fits = input.dim() >= dims && sizes.slice(input.dim() - dims).equals(normalized_shape);
  if (!fits) {
    std::ostringstream expected;
    for (const auto& size : normalized_shape) expected << ", " << size;
    TORCH_CHECK(false, op, ": Given normalized_shape=", normalized_shape,
                ", expected input with shape [*", expected.str(), "], but got input of size",
                sizes);
  }
  auto type = at::ScalarType::Undefined;
  for (const auto& [name, t] : {std::pair{"weight", &weight}, std::pair{"bias", &bias}}) {
    TORCH_CHECK(!*t || (*t)->sym_sizes().equals(normalized_shape), op, ": Expected ", name,
                " to be of same shape as normalized_shape, but got ", name, " of shape ",
                (*t)->sym_sizes(), " and normalized_shape = ", normalized_shape);
    check_device(op, name, *t, input);
    check_dtype(op, name, *t, input, type);
  }
  check_residual(op, input, residual);
  check_no_tangents(op, input, weight, bias, residual);
  c10::SymInt values = 1;
  for (const auto& size : normalized_shape) values = values * size;
  c10::SymInt rows = 1;
  for (const auto& size : sizes.slice(0, input.dim() - dims)) rows = rows * size;
  const bool is_view = input.dim() == 2 && dims == 1;
  const auto as_rows = [&](const Tensor& t) {
    return is_view ? t : t.reshape_symint({rows, values});
  };
  const auto flat = [&](const OptionalTensor& t) -> OptionalTensor {
    return t && dims > 1 ? t->reshape_symint({values}) : t;
  };
  static const auto group = find_operator<Group>("batchops::group_norm");
  const OptionalTensor r = residual ? OptionalTensor(as_rows(*residual)) : residual;
  auto outputs =
      group.call(as_rows(input), 1, flat(weight), flat(bias), r, eps, activation, slope, false);
  // Nobody else has the rows: y is no view of them in autograd's eyes, which would forbid some of
  // what users do to an output in place.
  if (!is_view) std::get<0>(outputs) = at::_unsafe_view_symint(std::get<0>(outputs), sizes);
  return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // y, and what the backward needs: statistics [3, N * num_groups], and a bit mask or an empty
  // tensor.
  m.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, str activation, float slope=0.01, bool save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor stats, Tensor? mask, int num_groups, float eps, str activation, "
      "float slope, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, str activation, float slope=0.01) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  // y once more, from the statistics that group_norm returned for the same input.
  m.def(
      "group_norm_apply(Tensor input, Tensor stats, int num_groups, Tensor? weight, Tensor? bias, "
      "Tensor? residual, str activation, float slope=0.01) -> Tensor");
}

#define BATCHOPS_IMPLEMENT(m, suffix)                      \
  (m).impl("group_norm", &group_norm##suffix);             \
  (m).impl("group_norm_apply", &group_norm_apply##suffix); \
  (m).impl("group_norm_backward", &group_norm_backward##suffix)

TORCH_LIBRARY_IMPL(batchops, CPU, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, CUDA, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, Meta, m) { BATCHOPS_IMPLEMENT(m, _meta); }
#undef BATCHOPS_IMPLEMENT
TORCH_LIBRARY_IMPL(batchops, CompositeImplicitAutograd, m) { m.impl("layer_norm", &layer_norm); }

}  // namespace batchops::binding
