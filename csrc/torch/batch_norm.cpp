// torch.ops.batchops.batch_norm*: schemas, checks, allocation and launch; autograd in
// batch_norm_autograd.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <sstream>

#include "kernels/batch_norm.h"
#include "torch/activation.h"
#include "torch/norm.h"

namespace batchops::binding {
namespace {

constexpr const char* kOp = "batch_norm";

void check_running(const Tensor& input, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var) {
  auto type = at::ScalarType::Undefined;
  check_per_channel(kOp, "running_mean", running_mean, input, type);
  check_per_channel(kOp, "running_var", running_var, input, type);
}

void check_training(const Tensor& input, double eps) {
  TORCH_CHECK_VALUE(eps > 0, kOp, " eps must be positive during training, but got ", eps);
  c10::SymInt values = input.sym_size(0);
  for (int64_t d = 2; d < input.dim(); d++) values = values * input.sym_size(d);
  // torch's words, so that what matches on them goes on working.
  if (values == 1) {
    std::ostringstream sizes;
    sizes << input.sym_sizes();
    TORCH_CHECK_VALUE(false,
                      "Expected more than 1 value per channel when training, got input "
                      "size torch.Size(",
                      sizes.str(), ")");
  }
}

void raise_on(const char* message) { TORCH_CHECK(message == nullptr, kOp, ": ", message); }

ForwardOutputs forward(const Tensor& input, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual, bool training,
                       double momentum, double eps, std::string_view activation_name, double slope,
                       bool save_mask) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_norm_input(kOp, input, weight, bias, residual);
  check_running(input, running_mean, running_var);
  if (training) check_training(input, eps);

  const Dense x = to_dense(input);
  Tensor y = empty_like_dense(x.tensor);
  const auto stats_type = accumulate_type(input);
  const bool mask_wanted = save_mask && residual && traits_of(activation).maskable;
  Tensor mask = empty_mask(x, mask_wanted && input.numel() != 0);
  if (input.numel() == 0) {
    const auto options = input.options().dtype(stats_type).memory_format(std::nullopt);
    return {y, at::zeros({3, input.size(1)}, options), mask};
  }

  BatchNormForward args;
  args.shape = norm_shape<BatchNormShape>(x, weight, bias, activation, slope);
  Tensor stats = empty_on(input, {3, args.shape.C}, stats_type);

  const Parameter w(weight), b(bias);
  const Tensor z = residual ? in_layout_of(*residual, x) : Tensor();
  Tensor mean = running_mean ? running_mean->contiguous() : Tensor();
  Tensor var = running_var ? running_var->contiguous() : Tensor();
  if (mean.defined()) args.shape.running_dtype = *dtype_of(mean.scalar_type());

  args.x = x.tensor.const_data_ptr();
  args.residual = data_or_null(z);
  args.weight = w.data;
  args.bias = b.data;
  args.y = y.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  args.mask = mask_wanted ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto running_pointer = [&](const Tensor& t) {
    return !t.defined() ? nullptr
           : training   ? t.mutable_data_ptr()
                        : const_cast<void*>(t.const_data_ptr());
  };
  args.running_mean = running_pointer(mean);
  args.running_var = running_pointer(var);
  args.training = training;
  args.momentum = momentum;
  args.eps = eps;

  if (input.is_cpu()) {
    raise_on(batch_norm_forward_cpu(args, torch_threads()));
  } else {
    const c10::DeviceGuard guard(input.device());
    const int device = input.device().index();
    const auto bytes = static_cast<int64_t>(batch_norm_forward_workspace_cuda(args.shape, device));
    const Tensor workspace = empty_on(input, {bytes}, at::kByte);
    raise_on(batch_norm_forward_cuda(args, workspace.mutable_data_ptr(), device,
                                     current_stream(input.device())));
  }
  if (training && running_mean && !mean.is_same(*running_mean)) running_mean->copy_(mean);
  if (training && running_var && !var.is_same(*running_var)) running_var->copy_(var);
  return {y, stats, mask};
}

ForwardOutputs batch_norm(const Tensor& input, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                          std::string_view activation, double slope, bool save_mask) {
  return forward(input, {}, {}, weight, bias, residual, true, 0, eps, activation, slope, save_mask);
}

ForwardOutputs batch_norm_update(const Tensor& input, Tensor& running_mean, Tensor& running_var,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, double momentum, double eps,
                                 std::string_view activation, double slope, bool save_mask) {
  return forward(input, running_mean, running_var, weight, bias, residual, true, momentum, eps,
                 activation, slope, save_mask);
}

ForwardOutputs batch_norm_eval(const Tensor& input, const Tensor& running_mean,
                               const Tensor& running_var, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               double eps, std::string_view activation, double slope,
                               bool save_mask) {
  return forward(input, running_mean, running_var, weight, bias, residual, false, 0, eps,
                 activation, slope, save_mask);
}

BackwardOutputs batch_norm_backward(const Tensor& dy, const Tensor& input,
                                    const OptionalTensor& residual, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& stats,
                                    const OptionalTensor& mask, bool training, double eps,
                                    std::string_view activation, double slope,
                                    std::array<bool, 4> output_mask) {
  (void)eps;  // only the derivative of this operator needs it
  constexpr const char* op = "batch_norm_backward";
  const NormBackwardCall call{op,       dy,         input,
                              residual, weight,     bias,
                              stats,    mask,       parse_activation(op, activation),
                              slope,    output_mask};
  call.check(input.sym_size(1).expect_int());
  NormBackwardTensors tensors(call);
  if (tensors.done) return tensors.outputs();
  const Parameter w(weight), b(bias);
  BatchNormBackward args;
  args.shape = norm_shape<BatchNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.training = training;
  tensors.fill(args, call, w, b);
  if (input.is_cpu()) {
    raise_on(batch_norm_backward_cpu(args, torch_threads()));
  } else {
    const c10::DeviceGuard guard(input.device());
    const int device = input.device().index();
    const auto bytes = static_cast<int64_t>(batch_norm_backward_workspace_cuda(args.shape, device));
    const Tensor workspace = empty_on(input, {bytes}, at::kByte);
    raise_on(batch_norm_backward_cuda(args, workspace.mutable_data_ptr(), device,
                                      current_stream(input.device())));
  }
  return tensors.outputs();
}

// --- shapes without data: meta tensors, FakeTensor, torch.compile, export ------------------------

ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            bool training, double eps, std::string_view activation_name, double,
                            bool save_mask) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_norm_input(kOp, input, weight, bias, residual);
  check_running(input, running_mean, running_var);
  if (training) check_training(input, eps);
  const bool mask_wanted = save_mask && residual && traits_of(activation).maskable;
  const auto options = input.options().memory_format(std::nullopt);
  return {empty_like_meta(input),
          at::empty_symint({3, input.sym_size(1)}, options.dtype(accumulate_type(input))),
          empty_mask_meta(input, mask_wanted && input.sym_numel() != 0)};
}

ForwardOutputs batch_norm_meta(const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               double eps, std::string_view activation, double slope,
                               bool save_mask) {
  return forward_meta(input, {}, {}, weight, bias, residual, true, eps, activation, slope,
                      save_mask);
}

ForwardOutputs batch_norm_update_meta(const Tensor& input, Tensor& running_mean,
                                      Tensor& running_var, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                      double, double eps, std::string_view activation, double slope,
                                      bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, true, eps,
                      activation, slope, save_mask);
}

ForwardOutputs batch_norm_eval_meta(const Tensor& input, const Tensor& running_mean,
                                    const Tensor& running_var, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                    double eps, std::string_view activation, double slope,
                                    bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, false, eps,
                      activation, slope, save_mask);
}

BackwardOutputs batch_norm_backward_meta(const Tensor&, const Tensor& input, const OptionalTensor&,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor&, const OptionalTensor&, bool, double,
                                         std::string_view, double,
                                         std::array<bool, 4> output_mask) {
  return norm_backward_meta(input, weight, bias, output_mask);
}

Tensor activation_op(const Tensor& z, std::string_view name, double slope) {
  return activation_forward(parse_activation("activation", name), z, slope);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // y, and what the backward needs: statistics [3, C], and a bit mask or an empty tensor.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope=0.01, bool save_mask=False) -> (Tensor y, Tensor stats, Tensor "
      "mask)");
  m.def(
      "batch_norm_update(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, "
      "str activation, float slope=0.01, bool save_mask=False) -> (Tensor y, Tensor stats, Tensor "
      "mask)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, "
      "Tensor? bias, Tensor? residual, float eps, str activation, float slope=0.01, bool "
      "save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? residual, Tensor? weight, Tensor? "
      "bias, "
      "Tensor stats, Tensor? mask, bool training, float eps, str activation, float slope, "
      "bool[4] output_mask) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def("activation(Tensor z, str name, float slope=0.01) -> Tensor");
}

#define BATCHOPS_IMPLEMENT(m, suffix)                        \
  (m).impl("batch_norm", &batch_norm##suffix);               \
  (m).impl("batch_norm_update", &batch_norm_update##suffix); \
  (m).impl("batch_norm_eval", &batch_norm_eval##suffix);     \
  (m).impl("batch_norm_backward", &batch_norm_backward##suffix)

TORCH_LIBRARY_IMPL(batchops, CPU, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, CUDA, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, Meta, m) { BATCHOPS_IMPLEMENT(m, _meta); }
TORCH_LIBRARY_IMPL(batchops, CompositeImplicitAutograd, m) { m.impl("activation", &activation_op); }

}  // namespace batchops::binding
