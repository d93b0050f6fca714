// torch.ops.batchops.batch_norm*: schemas, checks, allocation and launch; autograd in
// norm_autograd.cpp.
#include <torch/library.h>

#include <sstream>
#include <string>

#include "kernels/batch_norm.h"
#include "torch/activation.h"
#include "torch/norm.h"

namespace batchops::binding {
namespace {

constexpr const char* kBatchNorm = "batch_norm";

void check_running(const Tensor& input, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var) {
  auto type = at::ScalarType::Undefined;
  check_per_channel(kBatchNorm, "running_mean", running_mean, input);
  check_dtype(kBatchNorm, "running_mean", running_mean, input, type);
  check_per_channel(kBatchNorm, "running_var", running_var, input);
  check_dtype(kBatchNorm, "running_var", running_var, input, type);
}

// As Python prints it, so that torch's words come out whole.
std::string python_float(double value) {
  std::ostringstream text;
  text << value;
  const bool whole = text.str().find_first_not_of("-0123456789") == std::string::npos;
  return whole ? text.str() + ".0" : text.str();
}

// Ghost batches of one value have no variance either.
void check_training(const Tensor& input, double eps, int64_t ghost) {
  TORCH_CHECK_VALUE(!(eps <= 0), kBatchNorm, " eps must be positive during training, but got ",
                    python_float(eps));
  TORCH_CHECK_VALUE(ghost >= 0, kBatchNorm,
                    ": expected ghost_batch_size to be positive, or 0 for the whole batch, got ",
                    ghost);
  c10::SymInt values = 1;
  for (int64_t d = 2; d < input.dim(); d++) values = values * input.sym_size(d);
  const bool one_value = ghost == 1 && values == 1 && input.sym_size(0) > 1;
  TORCH_CHECK_VALUE(!one_value, kBatchNorm,
                    ": expected more than 1 value per channel in a ghost batch when training, got "
                    "ghost_batch_size=1 and input of size ",
                    input.sym_sizes());
  // torch's words, so that what matches on them goes on working.
  if (values * input.sym_size(0) == 1) {
    std::ostringstream sizes;
    sizes << input.sym_sizes();
    TORCH_CHECK_VALUE(false,
                      "Expected more than 1 value per channel when training, got input "
                      "size torch.Size(",
                      sizes.str(), ")");
  }
}

// Columns of `stats`: BatchNormShape::ghosts() times C, for sizes that may be symbols.
c10::SymInt stats_columns(const Tensor& input, int64_t ghost) {
  const c10::SymInt N = input.sym_size(0), C = input.sym_size(1);
  if (ghost <= 0 || N <= ghost) return C;
  // One condition on N at a time: of a product with other sizes torch.compile may lose the guard.
  const c10::SymInt full = N / ghost, left = N % ghost;
  if (left == 0) return full * C;
  if (left > 1) return (full + 1) * C;
  c10::SymInt positions = 1;
  for (int64_t d = 2; d < input.dim(); d++) positions = positions * input.sym_size(d);
  return (positions > 1 ? full + 1 : full) * C;
}

ForwardOutputs forward(const Tensor& input, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual, bool training,
                       double momentum, double eps, std::string_view activation, double slope,
                       bool save_mask, int64_t ghost, const OptionalTensor& stats) {
  const NormForwardCall call{kBatchNorm, input,    weight,
                             bias,       residual, parse_activation(kBatchNorm, activation),
                             slope,      save_mask};
  check_norm_input(kBatchNorm, input);
  check_running(input, running_mean, running_var);
  check_affine(kBatchNorm, input, weight, bias);
  check_residual(kBatchNorm, input, residual);
  if (training && !stats) check_training(input, eps, ghost);
  NormForwardTensors tensors(call, stats_columns(input, ghost).expect_int(), stats);
  if (input.numel() == 0) return tensors.outputs();

  check_memory(kBatchNorm, "running_mean", running_mean);
  check_memory(kBatchNorm, "running_var", running_var);
  Tensor mean = running_mean ? running_mean->contiguous() : Tensor();
  Tensor var = running_var ? running_var->contiguous() : Tensor();
  BatchNormForward args;
  args.shape = norm_shape<BatchNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.shape.ghost = ghost;
  if (mean.defined()) args.shape.running_dtype = *dtype_of(mean.scalar_type());
  tensors.fill(args);
  const auto running_pointer = [&](const Tensor& t) {
    return !t.defined() ? nullptr
           : training   ? t.mutable_data_ptr()
                        : const_cast<void*>(t.const_data_ptr());
  };
  args.running_mean = running_pointer(mean);
  args.running_var = running_pointer(var);
  args.have_stats = stats.has_value();
  args.training = training;
  args.momentum = momentum;
  args.eps = eps;
  launch(kBatchNorm, input, args, batch_norm_forward_cpu, batch_norm_forward_workspace_cuda,
         batch_norm_forward_cuda);
  if (training && running_mean && !mean.is_same(*running_mean)) running_mean->copy_(mean);
  if (training && running_var && !var.is_same(*running_var)) running_var->copy_(var);
  return tensors.outputs();
}

ForwardOutputs batch_norm(const Tensor& input, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                          std::string_view activation, double slope, bool save_mask,
                          int64_t ghost) {
  return forward(input, {}, {}, weight, bias, residual, true, 0, eps, activation, slope, save_mask,
                 ghost, {});
}

ForwardOutputs batch_norm_update(const Tensor& input, Tensor& running_mean, Tensor& running_var,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, double momentum, double eps,
                                 std::string_view activation, double slope, bool save_mask,
                                 int64_t ghost) {
  return forward(input, running_mean, running_var, weight, bias, residual, true, momentum, eps,
                 activation, slope, save_mask, ghost, {});
}

ForwardOutputs batch_norm_eval(const Tensor& input, const Tensor& running_mean,
                               const Tensor& running_var, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               double eps, std::string_view activation, double slope,
                               bool save_mask) {
  return forward(input, running_mean, running_var, weight, bias, residual, false, 0, eps,
                 activation, slope, save_mask, 0, {});
}

Tensor batch_norm_apply(const Tensor& input, const Tensor& stats, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual,
                        std::string_view activation, double slope, int64_t ghost) {
  return std::get<0>(forward(input, {}, {}, weight, bias, residual, true, 0, 0, activation, slope,
                             false, ghost, stats));
}

BackwardOutputs batch_norm_backward(const Tensor& dy, const Tensor& input,
                                    const OptionalTensor& residual, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& stats,
                                    const OptionalTensor& mask, bool training, double eps,
                                    std::string_view activation, double slope,
                                    std::array<bool, 4> output_mask, int64_t ghost) {
  (void)eps;  // only the derivative of this operator needs it
  constexpr const char* op = "batch_norm_backward";
  const NormBackwardCall call{op,       dy,         input,
                              residual, weight,     bias,
                              stats,    mask,       parse_activation(op, activation),
                              slope,    output_mask};
  call.check(stats_columns(input, ghost).expect_int());
  NormBackwardTensors tensors(call);
  if (tensors.done) return tensors.outputs();
  BatchNormBackward args;
  args.shape = norm_shape<BatchNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.shape.ghost = ghost;
  args.training = training;
  tensors.fill(args, call);
  launch(op, input, args, batch_norm_backward_cpu, batch_norm_backward_workspace_cuda,
         batch_norm_backward_cuda);
  return tensors.outputs();
}

// --- shapes without data: meta tensors, FakeTensor, torch.compile, export ------------------------

ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            bool training, double eps, std::string_view activation, double slope,
                            bool save_mask, int64_t ghost) {
  const NormForwardCall call{kBatchNorm, input,    weight,
                             bias,       residual, parse_activation(kBatchNorm, activation),
                             slope,      save_mask};
  check_norm_input(kBatchNorm, input);
  check_running(input, running_mean, running_var);
  check_affine(kBatchNorm, input, weight, bias);
  check_residual(kBatchNorm, input, residual);
  if (training) check_training(input, eps, ghost);
  return norm_forward_meta(call, stats_columns(input, ghost));
}

ForwardOutputs batch_norm_meta(const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               double eps, std::string_view activation, double slope,
                               bool save_mask, int64_t ghost) {
  return forward_meta(input, {}, {}, weight, bias, residual, true, eps, activation, slope,
                      save_mask, ghost);
}

ForwardOutputs batch_norm_update_meta(const Tensor& input, Tensor& running_mean,
                                      Tensor& running_var, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                      double, double eps, std::string_view activation, double slope,
                                      bool save_mask, int64_t ghost) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, true, eps,
                      activation, slope, save_mask, ghost);
}

ForwardOutputs batch_norm_eval_meta(const Tensor& input, const Tensor& running_mean,
                                    const Tensor& running_var, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                    double eps, std::string_view activation, double slope,
                                    bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, false, eps,
                      activation, slope, save_mask, 0);
}

Tensor batch_norm_apply_meta(const Tensor& input, const Tensor&, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual,
                             std::string_view activation, double slope, int64_t) {
  return std::get<0>(
      forward_meta(input, {}, {}, weight, bias, residual, false, 0, activation, slope, false, 0));
}

BackwardOutputs batch_norm_backward_meta(const Tensor&, const Tensor& input, const OptionalTensor&,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor&, const OptionalTensor&, bool, double,
                                         std::string_view, double, std::array<bool, 4> output_mask,
                                         int64_t) {
  return norm_backward_meta(input, weight, bias, output_mask);
}

Tensor activation_op(const Tensor& z, std::string_view name, double slope) {
  return activation_forward(parse_activation("activation", name), z, slope);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // y, and what the backward needs: statistics [3, ghost batches * C], and a bit mask or an empty
  // tensor.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope=0.01, bool save_mask=False, int ghost_batch_size=0) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_update(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, "
      "str activation, float slope=0.01, bool save_mask=False, int ghost_batch_size=0) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, "
      "Tensor? bias, Tensor? residual, float eps, str activation, float slope=0.01, bool "
      "save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? residual, Tensor? weight, Tensor? "
      "bias, "
      "Tensor stats, Tensor? mask, bool training, float eps, str activation, float slope, "
      "bool[4] output_mask, int ghost_batch_size=0) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  // y once more, from the statistics that one of the above returned for the same input.
  m.def(
      "batch_norm_apply(Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
      "Tensor? residual, str activation, float slope=0.01, int ghost_batch_size=0) -> Tensor");
  m.def("activation(Tensor z, str name, float slope=0.01) -> Tensor");
}

#define BATCHOPS_IMPLEMENT(m, suffix)                        \
  (m).impl("batch_norm", &batch_norm##suffix);               \
  (m).impl("batch_norm_update", &batch_norm_update##suffix); \
  (m).impl("batch_norm_eval", &batch_norm_eval##suffix);     \
  (m).impl("batch_norm_apply", &batch_norm_apply##suffix);   \
  (m).impl("batch_norm_backward", &batch_norm_backward##suffix)

TORCH_LIBRARY_IMPL(batchops, CPU, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, CUDA, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, Meta, m) { BATCHOPS_IMPLEMENT(m, _meta); }
#undef BATCHOPS_IMPLEMENT
TORCH_LIBRARY_IMPL(batchops, CompositeImplicitAutograd, m) { m.impl("activation", &activation_op); }

}  // namespace batchops::binding
