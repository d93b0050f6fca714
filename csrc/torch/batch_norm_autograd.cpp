// Autograd of batch norm: a hand-written node for the backward, and one for the double backward.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "torch/activation.h"
#include "torch/batch_norm.h"
#include "torch/common.h"

namespace batchops::binding {
namespace {

namespace ag = torch::autograd;
using OptionalTensor = std::optional<Tensor>;

using Train = ForwardOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, double, std::string_view, bool);
using Update = ForwardOutputs(const Tensor&, Tensor&, Tensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, double, double,
                              std::string_view, bool);
using Eval = ForwardOutputs(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, double, std::string_view,
                            bool);
using Backward = BackwardOutputs(const Tensor&, const Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, const Tensor&, const OptionalTensor&, bool,
                                 double, std::string_view, std::array<bool, 4>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What both nodes keep of a call.
struct Saved {
  ag::SavedVariable input, weight, bias, stats, mask;
  bool training = true;
  double eps = 0;
  Activation activation = Activation::none;

  void reset() {
    for (auto* saved : {&input, &weight, &bias, &stats, &mask}) saved->reset_data();
  }
};

// --- double backward ---------------------------------------------------------------------------

Tensor per_channel(const Tensor& t, const Tensor& x) {
  std::vector<int64_t> view(x.dim(), 1);
  view[1] = -1;
  return t.view(view);
}

// The bit mask as a tensor of 0 and 1 of the size of `like`, in like's dtype.
Tensor unpack_mask(const Tensor& mask, const Tensor& like) {
  const int64_t N = like.size(0), C = like.size(1), HxW = spatial_size(like);
  const bool last = layout_of_mask(mask) == Layout::channels_last;
  const int64_t row = last ? C : HxW;
  const Tensor bits = mask.unsqueeze(-1)
                          .bitwise_right_shift(at::arange(8, mask.options()))
                          .bitwise_and(1)
                          .view({-1, (row + 7) / 8 * 8})
                          .narrow(1, 0, row);
  const Tensor shaped =
      last ? bits.reshape({N, HxW, C}).transpose(1, 2) : bits.reshape({N, C, HxW});
  return shaped.reshape(like.sizes()).to(like.scalar_type());
}

// The backward once more, by torch operations that are differentiable in dy, x, weight and bias.
BackwardOutputs differentiable_backward(const Tensor& dy, const Tensor& input, const Tensor& weight,
                                        const Tensor& bias, const Tensor& stats, const Tensor& mask,
                                        bool training, double eps, Activation activation) {
  const auto type = stats.scalar_type();
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < input.dim(); d++) {
    if (d != 1) dims.push_back(d);
  }
  const auto mean_over = [&](const Tensor& t) { return t.mean(dims, /*keepdim=*/true); };
  const Tensor x = input.to(type);
  Tensor centred, rstd;
  if (training) {
    centred = x - mean_over(x);
    rstd = at::rsqrt(mean_over(centred * centred) + eps);
  } else {
    centred = x - per_channel(stats[0], x) - per_channel(stats[1], x);
    rstd = per_channel(stats[2], x);
  }
  const Tensor xhat = centred * rstd;
  const Tensor gamma = weight.defined() ? per_channel(weight.to(type), x) : Tensor();
  Tensor dz = dy.to(type);
  if (mask.defined()) {
    dz = dz * unpack_mask(mask, input).to(type);
  } else if (traits_of(activation).needs_z) {
    Tensor z = gamma.defined() ? xhat * gamma : xhat;
    if (bias.defined()) z = z + per_channel(bias.to(type), x);
    dz = activation_backward(activation, dz, z);
  }
  Tensor dxhat = dz;
  if (training) dxhat = dz - mean_over(dz) - xhat * mean_over(dz * xhat);
  Tensor dx = dxhat * rstd;
  if (gamma.defined()) dx = dx * gamma;
  const auto param_type = weight.defined() ? weight.scalar_type() : input.scalar_type();
  return {dx.to(input.scalar_type()), dz.to(input.scalar_type()),
          (dz * xhat).sum(dims).to(param_type), dz.sum(dims).to(param_type)};
}

struct BatchNormDoubleBackward : ag::Node {
  Saved saved;
  ag::SavedVariable dy;

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode grad_mode(true);
    // Aliases, so that a path from one input to another (dy computed from x) is not followed, yet
    // a further derivative still is.
    const auto alias = [](const Tensor& t) { return t.defined() ? t.view_as(t) : t; };
    const ag::variable_list inputs = {alias(dy.unpack()), alias(saved.input.unpack()),
                                      alias(saved.weight.unpack()), alias(saved.bias.unpack())};
    const auto [dx, dresidual, dweight, dbias] =
        differentiable_backward(inputs[0], inputs[1], inputs[2], inputs[3], saved.stats.unpack(),
                                saved.mask.unpack(), saved.training, saved.eps, saved.activation);
    ag::variable_list outputs, output_grads, wanted;
    const ag::variable_list results = {dx, dresidual, dweight, dbias};
    for (size_t i = 0; i < results.size(); i++) {
      if (!grads[i].defined() || !results[i].requires_grad()) continue;
      outputs.push_back(results[i]);
      output_grads.push_back(grads[i]);
    }
    std::vector<size_t> position;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (!task_should_compute_output(i) || !inputs[i].defined() || !inputs[i].requires_grad()) {
        continue;
      }
      wanted.push_back(inputs[i]);
      position.push_back(i);
    }
    ag::variable_list result(inputs.size());
    if (outputs.empty() || wanted.empty()) return result;
    const auto found = ag::grad(outputs, wanted, output_grads, /*retain_graph=*/true, create_graph,
                                /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); i++) result[position[i]] = found[i];
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset();
    dy.reset_data();
  }

  std::string name() const override { return "BatchopsBatchNormDoubleBackward"; }
};

BackwardOutputs call_backward(const Tensor& dy, const Tensor& input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor& stats,
                              const OptionalTensor& mask, bool training, double eps,
                              std::string_view activation, std::array<bool, 4> output_mask) {
  static const auto op = find<Backward>("batchops::batch_norm_backward");
  return op.call(dy, input, weight, bias, stats, mask, training, eps, activation, output_mask);
}

BackwardOutputs backward_autograd(const Tensor& dy, const Tensor& input,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const Tensor& stats, const OptionalTensor& mask, bool training,
                                  double eps, std::string_view activation,
                                  std::array<bool, 4> output_mask) {
  const bool requires_grad = ag::compute_requires_grad(dy, input, weight, bias);
  BackwardOutputs outputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    outputs =
        call_backward(dy, input, weight, bias, stats, mask, training, eps, activation, output_mask);
  }
  if (!requires_grad) return outputs;
  auto node = make_node<BatchNormDoubleBackward>();
  const Tensor w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
  node->set_next_edges(ag::collect_next_edges(dy, input, w, b));
  node->dy = ag::SavedVariable(dy, false);
  node->saved.input = ag::SavedVariable(input, false);
  node->saved.weight = ag::SavedVariable(w, false);
  node->saved.bias = ag::SavedVariable(b, false);
  node->saved.stats = ag::SavedVariable(stats, false);
  node->saved.mask = ag::SavedVariable(mask.value_or(Tensor()), false);
  node->saved.training = training;
  node->saved.eps = eps;
  node->saved.activation = parse_activation("batch_norm_backward", activation);
  ag::set_history(std::get<0>(outputs), node);
  ag::set_history(std::get<1>(outputs), node);
  ag::set_history(std::get<2>(outputs), node);
  ag::set_history(std::get<3>(outputs), node);
  return outputs;
}

// --- backward ----------------------------------------------------------------------------------

struct BatchNormBackward : ag::Node {
  Saved saved;

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& dy = grads[0];
    ag::variable_list result(4);
    if (!dy.defined()) return result;
    const bool residual_is_dy = saved.activation == Activation::none;
    const std::array<bool, 4> wanted = {
        task_should_compute_output(0), task_should_compute_output(1) && !residual_is_dy,
        task_should_compute_output(2), task_should_compute_output(3)};
    if (wanted[0] || wanted[1] || wanted[2] || wanted[3]) {
      auto [dx, dresidual, dweight, dbias] =
          call_backward(dy, saved.input.unpack(), defined_or_none(saved.weight.unpack()),
                        defined_or_none(saved.bias.unpack()), saved.stats.unpack(),
                        defined_or_none(saved.mask.unpack()), saved.training, saved.eps,
                        name_of(saved.activation), wanted);
      result = {dx, dresidual, dweight, dbias};
    }
    if (residual_is_dy && task_should_compute_output(1)) result[1] = dy;
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset();
  }

  std::string name() const override { return "BatchopsBatchNormBackward"; }
};

void refuse_forward_mode(const OptionalTensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!ag::isFwGradDefined(t),
                              "batch_norm: forward-mode automatic differentiation is not "
                              "implemented in batchops; use torch.nn.functional.batch_norm there");
}

// Runs `call(save_mask)` below autograd and, where a gradient is wanted, hangs the node on y.
template <class Call>
ForwardOutputs record(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, bool training, double eps,
                      std::string_view activation_name, bool save_mask, Call&& call) {
  for (const auto* t : {&weight, &bias, &residual}) refuse_forward_mode(*t);
  refuse_forward_mode(input);
  const bool requires_grad = ag::compute_requires_grad(input, weight, bias, residual);
  ForwardOutputs outputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    outputs = call(save_mask || requires_grad);
  }
  if (!requires_grad) return outputs;
  const Activation activation = parse_activation("batch_norm", activation_name);
  const auto traits = traits_of(activation);
  const bool masked = traits.maskable && residual.has_value();
  TORCH_CHECK_NOT_IMPLEMENTED(!traits.needs_z || masked || !residual, "batch_norm: activation '",
                              activation_name,
                              "' with a residual has no backward yet: its derivative is no bit, "
                              "and z cannot be recomputed from the input alone");
  auto node = make_node<BatchNormBackward>();
  const Tensor w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
  node->set_next_edges(ag::collect_next_edges(input, residual.value_or(Tensor()), w, b));
  node->saved.input = ag::SavedVariable(input, false);
  node->saved.weight = ag::SavedVariable(w, false);
  // bias shows up in the backward only where z is recomputed
  node->saved.bias = ag::SavedVariable(traits.needs_z && !masked ? b : Tensor(), false);
  node->saved.stats = ag::SavedVariable(std::get<1>(outputs), false);
  node->saved.mask = ag::SavedVariable(masked ? std::get<2>(outputs) : Tensor(), false);
  node->saved.training = training;
  node->saved.eps = eps;
  node->saved.activation = activation;
  ag::set_history(std::get<0>(outputs), node);
  return outputs;
}

ForwardOutputs batch_norm_autograd(const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                   double eps, std::string_view activation, bool save_mask) {
  static const auto op = find<Train>("batchops::batch_norm");
  return record(input, weight, bias, residual, true, eps, activation, save_mask, [&](bool mask) {
    return op.call(input, weight, bias, residual, eps, activation, mask);
  });
}

ForwardOutputs batch_norm_update_autograd(const Tensor& input, Tensor& running_mean,
                                          Tensor& running_var, const OptionalTensor& weight,
                                          const OptionalTensor& bias,
                                          const OptionalTensor& residual, double momentum,
                                          double eps, std::string_view activation, bool save_mask) {
  static const auto op = find<Update>("batchops::batch_norm_update");
  auto outputs =
      record(input, weight, bias, residual, true, eps, activation, save_mask, [&](bool mask) {
        return op.call(input, running_mean, running_var, weight, bias, residual, momentum, eps,
                       activation, mask);
      });
  ag::increment_version(running_mean);
  ag::increment_version(running_var);
  return outputs;
}

ForwardOutputs batch_norm_eval_autograd(const Tensor& input, const Tensor& running_mean,
                                        const Tensor& running_var, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& residual,
                                        double eps, std::string_view activation, bool save_mask) {
  static const auto op = find<Eval>("batchops::batch_norm_eval");
  return record(input, weight, bias, residual, false, eps, activation, save_mask, [&](bool mask) {
    return op.call(input, running_mean, running_var, weight, bias, residual, eps, activation, mask);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(batchops, Autograd, m) {
  m.impl("batch_norm", &batch_norm_autograd);
  m.impl("batch_norm_update", &batch_norm_update_autograd);
  m.impl("batch_norm_eval", &batch_norm_eval_autograd);
  m.impl("batch_norm_backward", &backward_autograd);
}

}  // namespace batchops::binding
