// torch.ops.batchops.batch_norm*: schemas, checks, allocation and launch; autograd in
// batch_norm_autograd.cpp.
#include "torch/batch_norm.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <sstream>

#include "kernels/batch_norm.h"
#include "torch/activation.h"
#include "torch/common.h"
#include "torch/pages.h"

namespace batchops::binding {
namespace {

constexpr const char* kOp = "batch_norm";

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_per_channel(const char* name, const std::optional<Tensor>& t, const Tensor& input,
                       at::ScalarType& type) {
  if (!t) return;
  TORCH_CHECK(t->device() == input.device(), kOp, ": expected ", name, " on ", input.device(),
              ", where input is, but got it on ", t->device());
  TORCH_CHECK(t->sym_numel() == input.sym_size(1), kOp, ": ", name, " should contain ",
              input.sym_size(1), " elements, one for each channel of the input of size ",
              input.sym_sizes(), ", not ", t->sym_numel());
  TORCH_CHECK(t->dim() == 1, kOp, ": expected ", name, " to be 1-D, of size [", input.sym_size(1),
              "], but got size ", t->sym_sizes());
  const at::ScalarType got = t->scalar_type();
  TORCH_CHECK(got == input.scalar_type() || got == at::kFloat, kOp, ": expected ", name, " to be ",
              input.scalar_type(), " (like input) or Float, but got ", got);
  TORCH_CHECK(type == at::ScalarType::Undefined || type == got, kOp, ": expected ", name, " to be ",
              type, ", like its companion, but got ", got);
  type = got;
}

void check_input(const Tensor& input, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual) {
  TORCH_CHECK(input.dim() >= 2, kOp, ": expected input of 2 or more dimensions (N, C, *), got ",
              input.dim(), "-D of size ", input.sym_sizes());
  TORCH_CHECK(input.layout() == at::kStrided, kOp, ": expected a dense input, got layout ",
              input.layout());
  TORCH_CHECK(dtype_of(input.scalar_type()), kOp,
              ": expected input to be Float, Half, BFloat16 or Double, got ", input.scalar_type());
  auto type = at::ScalarType::Undefined;
  check_per_channel("weight", weight, input, type);
  check_per_channel("bias", bias, input, type);
  if (residual) {
    TORCH_CHECK(residual->device() == input.device(), kOp, ": expected residual on ",
                input.device(), ", where input is, but got it on ", residual->device());
    TORCH_CHECK(residual->scalar_type() == input.scalar_type(), kOp, ": expected residual to be ",
                input.scalar_type(), " like input, but got ", residual->scalar_type());
    TORCH_CHECK(residual->sym_sizes().equals(input.sym_sizes()), kOp,
                ": expected residual of input's size ", input.sym_sizes(), ", but got ",
                residual->sym_sizes());
  }
}

void check_running(const Tensor& input, const std::optional<Tensor>& running_mean,
                   const std::optional<Tensor>& running_var) {
  auto type = at::ScalarType::Undefined;
  check_per_channel("running_mean", running_mean, input, type);
  check_per_channel("running_var", running_var, input, type);
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

// The data of an optional parameter; keeps a contiguous copy alive where one had to be made.
struct Parameter {
  Tensor held;
  const void* data = nullptr;

  explicit Parameter(const std::optional<Tensor>& t) {
    if (!t) return;
    held = t->contiguous();
    data = held.const_data_ptr();
  }
};

BatchNormShape shape_of(const Dense& input, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, Activation activation) {
  BatchNormShape shape;
  shape.N = input.tensor.size(0);
  shape.C = input.tensor.size(1);
  shape.HxW = spatial_size(input.tensor);
  shape.layout = input.layout;
  shape.dtype = *dtype_of(input.tensor.scalar_type());
  shape.param_dtype = weight ? *dtype_of(weight->scalar_type())
                      : bias ? *dtype_of(bias->scalar_type())
                             : shape.dtype;
  shape.activation = activation;
  return shape;
}

Tensor empty_like_dense(const Tensor& x) {
  if (x.is_cpu()) {
    Tensor t = at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.options());
    advise_huge_pages(t.mutable_data_ptr(), t.nbytes());
    return t;
  }
  return at::empty_strided(x.sizes(), x.strides(), x.options());
}

Tensor empty_on(const Tensor& x, at::IntArrayRef size, at::ScalarType type) {
  const auto options = x.options().dtype(type).memory_format(std::nullopt);
  return x.is_cpu() ? Tensor(at::detail::empty_cpu(size, options)) : at::empty(size, options);
}

// Of no element where no mask is wanted.
Tensor empty_mask(const Tensor& x, const BatchNormShape* shape) {
  if (shape == nullptr) return empty_on(x, {0}, at::kByte);
  if (shape->layout == Layout::channels_first) {
    return empty_on(x, {shape->N, shape->C, (shape->HxW + 7) / 8}, at::kByte);
  }
  return empty_on(x, {shape->N * shape->HxW, (shape->C + 7) / 8}, at::kByte);
}

void raise_on(const char* message) { TORCH_CHECK(message == nullptr, kOp, ": ", message); }

ForwardOutputs forward(const Tensor& input, const std::optional<Tensor>& running_mean,
                       const std::optional<Tensor>& running_var,
                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, bool training, double momentum,
                       double eps, std::string_view activation_name, bool save_mask) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_input(input, weight, bias, residual);
  check_running(input, running_mean, running_var);
  if (training) check_training(input, eps);

  const Dense x = to_dense(input);
  Tensor y = empty_like_dense(x.tensor);
  const auto stats_type = accumulate_type(input);
  if (input.numel() == 0) {
    return {y, at::zeros({3, input.size(1)}, input.options().dtype(stats_type)),
            empty_mask(input, nullptr)};
  }

  BatchNormForward args;
  args.shape = shape_of(x, weight, bias, activation);
  Tensor stats = empty_on(input, {3, args.shape.C}, stats_type);
  const bool mask_wanted = save_mask && residual && traits_of(activation).maskable;
  Tensor mask = empty_mask(input, mask_wanted ? &args.shape : nullptr);

  const Parameter w(weight), b(bias);
  const Tensor z = residual ? in_layout_of(*residual, x) : Tensor();
  Tensor mean = running_mean ? running_mean->contiguous() : Tensor();
  Tensor var = running_var ? running_var->contiguous() : Tensor();
  if (mean.defined()) args.shape.running_dtype = *dtype_of(mean.scalar_type());

  args.x = x.tensor.const_data_ptr();
  args.residual = z.defined() ? z.const_data_ptr() : nullptr;
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

ForwardOutputs batch_norm(const Tensor& input, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                          double eps, std::string_view activation, bool save_mask) {
  return forward(input, {}, {}, weight, bias, residual, true, 0, eps, activation, save_mask);
}

ForwardOutputs batch_norm_update(const Tensor& input, Tensor& running_mean, Tensor& running_var,
                                 const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& residual, double momentum, double eps,
                                 std::string_view activation, bool save_mask) {
  return forward(input, running_mean, running_var, weight, bias, residual, true, momentum, eps,
                 activation, save_mask);
}

ForwardOutputs batch_norm_eval(const Tensor& input, const Tensor& running_mean,
                               const Tensor& running_var, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, double eps,
                               std::string_view activation, bool save_mask) {
  return forward(input, running_mean, running_var, weight, bias, residual, false, 0, eps,
                 activation, save_mask);
}

BackwardOutputs batch_norm_backward(const Tensor& dy, const Tensor& input,
                                    const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, const Tensor& stats,
                                    const std::optional<Tensor>& mask, bool training, double eps,
                                    std::string_view activation_name,
                                    std::array<bool, 4> output_mask) {
  (void)eps;  // only the derivative of this operator needs it
  const Activation activation = parse_activation("batch_norm_backward", activation_name);
  check_input(input, weight, bias, std::nullopt);
  TORCH_CHECK(dy.sizes() == input.sizes() && dy.scalar_type() == input.scalar_type() &&
                  dy.device() == input.device(),
              "batch_norm_backward: expected dy of size ", input.sizes(), ", ", input.scalar_type(),
              ", on ", input.device(), ", like input, but got ", dy.sizes(), ", ", dy.scalar_type(),
              ", on ", dy.device());
  TORCH_CHECK(stats.sizes() == at::IntArrayRef({3, input.size(1)}) &&
                  stats.scalar_type() == accumulate_type(input) && stats.is_contiguous() &&
                  stats.device() == input.device(),
              "batch_norm_backward: expected stats as batch_norm returned them, of size [3, ",
              input.size(1), "], got ", stats.sizes(), " ", stats.scalar_type());

  TORCH_CHECK(!mask || mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                           mask->device() == input.device(),
              "batch_norm_backward: expected mask as batch_norm returned it, contiguous Byte on ",
              input.device(), ", got ", mask->scalar_type(), " on ", mask->device());
  const Dense x = mask ? in_layout(input, layout_of_mask(*mask)) : to_dense(input);
  const auto [want_dx, want_dresidual, want_dweight, want_dbias] = output_mask;
  BatchNormBackward args;
  args.shape = shape_of(x, weight, bias, activation);
  const auto param_type = weight ? weight->scalar_type()
                          : bias ? bias->scalar_type()
                                 : input.scalar_type();
  const int64_t C = input.size(1);
  const auto per_channel = [&](bool wanted) {
    if (!wanted) return Tensor();
    if (input.numel() != 0) return empty_on(input, {C}, param_type);
    return at::zeros({C}, input.options().dtype(param_type));
  };
  Tensor dx = want_dx ? empty_like_dense(x.tensor) : Tensor();
  Tensor dresidual = want_dresidual ? empty_like_dense(x.tensor) : Tensor();
  Tensor dweight = per_channel(want_dweight);
  Tensor dbias = per_channel(want_dbias);
  if (input.numel() == 0) return {dx, dresidual, dweight, dbias};

  TORCH_CHECK(!mask || mask->numel() == args.shape.mask_bytes(),
              "batch_norm_backward: expected a mask of ", args.shape.mask_bytes(),
              " bytes as batch_norm returned it, got ", mask ? mask->numel() : 0);
  if (want_dresidual && activation == Activation::none) {
    dresidual.copy_(dy);
    if (!want_dx && !want_dweight && !want_dbias) return {dx, dresidual, dweight, dbias};
  }
  const Tensor dy_dense = in_layout_of(dy, x);
  const Parameter w(weight), b(bias);
  const auto output = [](Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  args.dy = dy_dense.const_data_ptr();
  args.x = x.tensor.const_data_ptr();
  args.weight = w.data;
  args.bias = b.data;
  args.stats = stats.const_data_ptr();
  args.mask = mask ? mask->const_data_ptr<uint8_t>() : nullptr;
  args.dx = output(dx);
  args.dresidual = activation == Activation::none ? nullptr : output(dresidual);
  args.dweight = output(dweight);
  args.dbias = output(dbias);
  args.training = training;

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
  return {dx, dresidual, dweight, dbias};
}

// --- shapes without data: meta tensors, FakeTensor, torch.compile, export ------------------------

Tensor empty_like_meta(const Tensor& x) {
  if (x.is_contiguous() || is_channels_last_dense(x)) return at::empty_like(x);
  return at::empty_symint(x.sym_sizes(), x.options(), x.suggest_memory_format());
}

// As empty_mask, for the layout that to_dense decides on.
Tensor empty_mask_meta(const Tensor& x, bool wanted) {
  const auto options = x.options().dtype(at::kByte).memory_format(std::nullopt);
  if (!wanted) return at::empty_symint({0}, options);
  const auto sizes = x.sym_sizes();
  c10::SymInt spatial = 1;
  for (size_t d = 2; d < sizes.size(); d++) spatial = spatial * sizes[d];
  const bool rows_of_channels =
      spatial == 1 ||
      (!x.is_contiguous() &&
       (is_channels_last_dense(x) || x.suggest_memory_format() != at::MemoryFormat::Contiguous));
  if (rows_of_channels) return at::empty_symint({sizes[0] * spatial, (sizes[1] + 7) / 8}, options);
  return at::empty_symint({sizes[0], sizes[1], (spatial + 7) / 8}, options);
}

ForwardOutputs forward_meta(const Tensor& input, const std::optional<Tensor>& running_mean,
                            const std::optional<Tensor>& running_var,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& residual, bool training, double eps,
                            std::string_view activation_name, bool save_mask) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_input(input, weight, bias, residual);
  check_running(input, running_mean, running_var);
  if (training) check_training(input, eps);
  const bool mask_wanted = save_mask && residual && traits_of(activation).maskable;
  const auto options = input.options().memory_format(std::nullopt);
  return {empty_like_meta(input),
          at::empty_symint({3, input.sym_size(1)}, options.dtype(accumulate_type(input))),
          empty_mask_meta(input, mask_wanted && input.sym_numel() != 0)};
}

ForwardOutputs batch_norm_meta(const Tensor& input, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, double eps,
                               std::string_view activation, bool save_mask) {
  return forward_meta(input, {}, {}, weight, bias, residual, true, eps, activation, save_mask);
}

ForwardOutputs batch_norm_update_meta(const Tensor& input, Tensor& running_mean,
                                      Tensor& running_var, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& residual, double, double eps,
                                      std::string_view activation, bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, true, eps,
                      activation, save_mask);
}

ForwardOutputs batch_norm_eval_meta(const Tensor& input, const Tensor& running_mean,
                                    const Tensor& running_var, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& residual, double eps,
                                    std::string_view activation, bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, false, eps,
                      activation, save_mask);
}

BackwardOutputs batch_norm_backward_meta(const Tensor&, const Tensor& input,
                                         const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& bias, const Tensor&,
                                         const std::optional<Tensor>&, bool, double,
                                         std::string_view, std::array<bool, 4> output_mask) {
  const auto param_type = weight ? weight->scalar_type()
                          : bias ? bias->scalar_type()
                                 : input.scalar_type();
  const auto options = input.options().dtype(param_type).memory_format(std::nullopt);
  const auto per_channel = [&](bool wanted) {
    return wanted ? at::empty_symint({input.sym_size(1)}, options) : Tensor();
  };
  const auto like_input = [&](bool wanted) { return wanted ? empty_like_meta(input) : Tensor(); };
  return {like_input(output_mask[0]), like_input(output_mask[1]), per_channel(output_mask[2]),
          per_channel(output_mask[3])};
}

Tensor activation_op(const Tensor& z, std::string_view name) {
  return activation_forward(parse_activation("activation", name), z);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // y, and what the backward needs: statistics [3, C], and a bit mask or an empty tensor.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, bool save_mask=False) -> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_update(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, "
      "str activation, bool save_mask=False) -> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, "
      "Tensor? bias, Tensor? residual, float eps, str activation, bool save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, "
      "Tensor? mask, bool training, float eps, str activation, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def("activation(Tensor z, str name) -> Tensor");
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
