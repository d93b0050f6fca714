// Autograd of the norms: a hand-written node for the backward, and one for the double backward.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <mutex>

#include "kernels/batch_norm.h"
#include "torch/activation.h"
#include "torch/common.h"
#include "torch/norm.h"

namespace batchops::binding {
namespace {

namespace ag = torch::autograd;

using BatchBackward = BackwardOutputs(const Tensor&, const Tensor&, const OptionalTensor&,
                                      const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                      const OptionalTensor&, bool, double, std::string_view, double,
                                      std::array<bool, 4>, int64_t);
using GroupBackward = BackwardOutputs(const Tensor&, const Tensor&, const OptionalTensor&,
                                      const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                      const OptionalTensor&, int64_t, double, std::string_view,
                                      double, std::array<bool, 4>);

// Which norm a node belongs to.
struct Norm {
  int64_t groups = 0;    // 0: batch norm
  bool training = true;  // of batch norm
  double eps = 0;
  Activation activation = Activation::none;
  double slope = 0;
  int64_t ghost = 0;  // of batch norm in training

  const char* name() const { return groups == 0 ? "batch_norm" : "group_norm"; }
};

// What both nodes keep of a call; `dy` is the double backward's.
struct Saved {
  ag::SavedVariable input, residual, weight, bias, stats, mask, dy;
  Norm norm;

  void reset() {
    for (auto* saved : tensors()) saved->reset_data();
  }
  std::array<ag::SavedVariable*, 7> tensors() {
    return {&input, &residual, &weight, &bias, &stats, &mask, &dy};
  }
  std::array<const ag::SavedVariable*, 7> tensors() const {
    return {&input, &residual, &weight, &bias, &stats, &mask, &dy};
  }
};

// A node of a norm; with what compiled autograd asks of it.
struct NormNode : ag::Node {
  Saved saved;

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset();
  }

  // What the graph of a backward is specialised on, and the tensors that become its inputs.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto* tensor : saved.tensors()) args.collect(*tensor, /*is_output=*/false);
    const Norm& norm = saved.norm;
    args.collect(norm.groups);
    args.collect(norm.training);
    args.collect(norm.eps);
    args.collect(static_cast<int32_t>(norm.activation));
    args.collect(norm.slope);
    args.collect(norm.ghost);
  }
  ag::variable_list apply_with_saved(const ag::variable_list& grads,
                                     torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto* tensor : saved.tensors()) swap.before(*tensor);
    ag::variable_list result = apply(ag::variable_list(grads));
    for (auto* tensor : saved.tensors()) swap.after(*tensor);
    return result;
  }
};

// --- double backward ---------------------------------------------------------------------------

// The sizes under which statistics and parameters are sums over whole dimensions:
//   batch norm (N, C, HxW),  group norm (N, G, C / G, HxW)
struct NormView {
  std::vector<int64_t> sizes, channel_sizes, statistics_dims, parameter_dims;

  NormView(const Norm& norm, const Tensor& x) {
    const int64_t N = x.size(0), C = x.size(1), HxW = spatial_size(x), G = norm.groups;
    if (G == 0) {
      sizes = {N, C, HxW};
      channel_sizes = {1, C, 1};
      statistics_dims = parameter_dims = {0, 2};
    } else {
      sizes = {N, G, C / G, HxW};
      channel_sizes = {1, G, C / G, 1};
      statistics_dims = {2, 3};
      parameter_dims = {0, 3};
    }
  }
  Tensor of(const Tensor& t) const { return t.reshape(sizes); }
  Tensor per_channel(const Tensor& t) const { return t.reshape(channel_sizes); }
  Tensor mean(const Tensor& t) const { return t.mean(statistics_dims, /*keepdim=*/true); }
  Tensor parameter_sum(const Tensor& t) const { return t.sum(parameter_dims).reshape({-1}); }
};

// The bit mask as a tensor of bool of the size of `like`.
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
  return shaped.reshape(like.sizes()).to(at::kBool);
}

// The backward of samples that share statistics (of each sample, for group norm) by torch
// operations that are differentiable in dy, x, residual, weight and bias. `bits`: the unpacked
// mask. The sums dweight and dbias stay in the precision of `stats`.
BackwardOutputs differentiable_part(const Tensor& dy, const Tensor& input, const Tensor& residual,
                                    const Tensor& weight, const Tensor& bias, const Tensor& stats,
                                    const Tensor& bits, const Norm& norm) {
  const auto type = stats.scalar_type();
  const NormView view(norm, input);
  const Tensor x = view.of(input.to(type));
  Tensor centred, rstd;
  if (norm.groups != 0 || norm.training) {
    centred = x - view.mean(x);
    rstd = at::rsqrt(view.mean(centred * centred) + norm.eps);
  } else {
    centred = x - view.per_channel(stats[0]) - view.per_channel(stats[1]);
    rstd = view.per_channel(stats[2]);
  }
  const Tensor xhat = centred * rstd;
  const Tensor gamma = weight.defined() ? view.per_channel(weight.to(type)) : Tensor();
  Tensor dz = view.of(dy.to(type));
  if (bits.defined()) {
    dz = activation_backward_bits(norm.activation, dz, view.of(bits), norm.slope);
  } else if (traits_of(norm.activation).needs_z) {
    Tensor z = gamma.defined() ? xhat * gamma : xhat;
    if (bias.defined()) z = z + view.per_channel(bias.to(type));
    if (residual.defined()) z = z + view.of(residual.to(type));
    dz = activation_backward(norm.activation, dz, z, norm.slope);
  }
  Tensor dx = gamma.defined() ? dz * gamma : dz;
  if (norm.groups != 0 || norm.training) dx = dx - view.mean(dx) - xhat * view.mean(dx * xhat);
  dx = dx * rstd;
  const auto like_input = [&](const Tensor& t) {
    return t.reshape(input.sizes()).to(input.scalar_type());
  };
  return {like_input(dx), like_input(dz), view.parameter_sum(dz * xhat), view.parameter_sum(dz)};
}

BackwardOutputs differentiable_backward(const Tensor& dy, const Tensor& input,
                                        const Tensor& residual, const Tensor& weight,
                                        const Tensor& bias, const Tensor& stats, const Tensor& mask,
                                        const Norm& norm) {
  const Tensor bits = mask.defined() ? unpack_mask(mask, input) : Tensor();
  BatchNormShape shape;
  shape.N = input.size(0);
  shape.HxW = spatial_size(input);
  shape.ghost = norm.ghost;
  std::vector<Tensor> dx, dresidual;
  Tensor dweight, dbias;
  for (int64_t k = 0; k < shape.ghosts(); k++) {
    const int64_t first = shape.first_sample(k), count = shape.first_sample(k + 1) - first;
    const auto part = [&](const Tensor& t) { return t.defined() ? t.narrow(0, first, count) : t; };
    const auto [x, r, w, b] = differentiable_part(part(dy), part(input), part(residual), weight,
                                                  bias, stats, part(bits), norm);
    dx.push_back(x);
    dresidual.push_back(r);
    dweight = k == 0 ? w : dweight + w;
    dbias = k == 0 ? b : dbias + b;
  }
  const auto type = param_type_of(input, defined_or_none(weight), defined_or_none(bias));
  const auto joined = [](const std::vector<Tensor>& parts) {
    return parts.size() == 1 ? parts[0] : at::cat(parts);
  };
  return {joined(dx), joined(dresidual), dweight.to(type), dbias.to(type)};
}

struct NormDoubleBackward : NormNode {
  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool records = at::GradMode::is_enabled();
    bool create_graph = ag::compute_requires_grad(grads);
    at::AutoGradMode grad_mode(true);
    // Aliases, so that a path from one input to another (dy computed from x) is not followed, yet
    // a further derivative still is. Where torch.func calls this after the transform that wanted
    // the derivative has ended, its inputs no longer require gradients by themselves.
    ag::variable_list inputs = {saved.dy.unpack(), saved.input.unpack(), saved.residual.unpack(),
                                saved.weight.unpack(), saved.bias.unpack()};
    for (size_t i = 0; i < inputs.size(); i++) {
      if (!inputs[i].defined()) continue;
      Tensor alias = inputs[i].view_as(inputs[i]);
      create_graph |= records && alias.requires_grad();
      if (task_should_compute_output(i) && !alias.requires_grad()) {
        alias = alias.detach().set_requires_grad(true);
        alias = alias.view_as(alias);
      }
      inputs[i] = alias;
    }
    const auto [dx, dresidual, dweight, dbias] =
        differentiable_backward(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4],
                                saved.stats.unpack(), saved.mask.unpack(), saved.norm);
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

  ag::variable_list apply_with_saved(const ag::variable_list&,
                                     torch::dynamo::autograd::SwapSavedVariables&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, saved.norm.name(),
                                ": compiled autograd of a double backward is not implemented; run "
                                "the outer backward outside of it");
  }

  std::string name() const override {
    return std::string("Batchops_") + saved.norm.name() + "_double_backward";
  }
};

template <class Op>
BackwardOutputs backward_autograd(const Tensor& dy, const Tensor& input,
                                  const OptionalTensor& residual, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& stats,
                                  const OptionalTensor& mask, const Norm& norm, Op&& op) {
  const bool requires_grad = ag::compute_requires_grad(dy, input, residual, weight, bias);
  BackwardOutputs outputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    outputs = op();
  }
  if (!requires_grad) return outputs;
  auto node = make_node<NormDoubleBackward>();
  const Tensor r = residual.value_or(Tensor()), w = weight.value_or(Tensor()),
               b = bias.value_or(Tensor());
  node->set_next_edges(ag::collect_next_edges(dy, input, r, w, b));
  node->saved.dy = ag::SavedVariable(dy, false);
  node->saved.input = ag::SavedVariable(input, false);
  node->saved.residual = ag::SavedVariable(r, false);
  node->saved.weight = ag::SavedVariable(w, false);
  node->saved.bias = ag::SavedVariable(b, false);
  node->saved.stats = ag::SavedVariable(stats, false);
  node->saved.mask = ag::SavedVariable(mask.value_or(Tensor()), false);
  node->saved.norm = norm;
  ag::set_history(std::get<0>(outputs), node);
  ag::set_history(std::get<1>(outputs), node);
  ag::set_history(std::get<2>(outputs), node);
  ag::set_history(std::get<3>(outputs), node);
  return outputs;
}

BackwardOutputs batch_norm_backward_autograd(const Tensor& dy, const Tensor& input,
                                             const OptionalTensor& residual,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& stats,
                                             const OptionalTensor& mask, bool training, double eps,
                                             std::string_view activation, double slope,
                                             std::array<bool, 4> output_mask, int64_t ghost) {
  static const auto op = find_operator<BatchBackward>("batchops::batch_norm_backward");
  const Norm norm{0,     training, eps, parse_activation("batch_norm_backward", activation),
                  slope, ghost};
  return backward_autograd(dy, input, residual, weight, bias, stats, mask, norm, [&] {
    return op.call(dy, input, residual, weight, bias, stats, mask, training, eps, activation, slope,
                   output_mask, ghost);
  });
}

BackwardOutputs group_norm_backward_autograd(const Tensor& dy, const Tensor& input,
                                             const OptionalTensor& residual,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& stats,
                                             const OptionalTensor& mask, int64_t num_groups,
                                             double eps, std::string_view activation, double slope,
                                             std::array<bool, 4> output_mask) {
  static const auto op = find_operator<GroupBackward>("batchops::group_norm_backward");
  const Norm norm{num_groups, true, eps, parse_activation("group_norm_backward", activation),
                  slope};
  return backward_autograd(dy, input, residual, weight, bias, stats, mask, norm, [&] {
    return op.call(dy, input, residual, weight, bias, stats, mask, num_groups, eps, activation,
                   slope, output_mask);
  });
}

// --- backward ----------------------------------------------------------------------------------

struct NormBackward : NormNode {
  BackwardOutputs call(const Tensor& dy, std::array<bool, 4> wanted) {
    const Norm& norm = saved.norm;
    const Tensor input = saved.input.unpack(), stats = saved.stats.unpack();
    const auto residual = defined_or_none(saved.residual.unpack());
    const auto weight = defined_or_none(saved.weight.unpack());
    const auto bias = defined_or_none(saved.bias.unpack());
    const auto mask = defined_or_none(saved.mask.unpack());
    if (norm.groups == 0) {
      static const auto op = find_operator<BatchBackward>("batchops::batch_norm_backward");
      return op.call(dy, input, residual, weight, bias, stats, mask, norm.training, norm.eps,
                     name_of(norm.activation), norm.slope, wanted, norm.ghost);
    }
    static const auto op = find_operator<GroupBackward>("batchops::group_norm_backward");
    return op.call(dy, input, residual, weight, bias, stats, mask, norm.groups, norm.eps,
                   name_of(norm.activation), norm.slope, wanted);
  }

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& dy = grads[0];
    ag::variable_list result(4);
    if (!dy.defined()) return result;
    const bool residual_is_dy = saved.norm.activation == Activation::none;
    const std::array<bool, 4> wanted = {
        task_should_compute_output(0), task_should_compute_output(1) && !residual_is_dy,
        task_should_compute_output(2), task_should_compute_output(3)};
    if (wanted[0] || wanted[1] || wanted[2] || wanted[3]) {
      auto [dx, dresidual, dweight, dbias] = call(dy, wanted);
      result = {dx, dresidual, dweight, dbias};
    }
    if (residual_is_dy && task_should_compute_output(1)) result[1] = dy;
    return result;
  }

  std::string name() const override {
    return std::string("Batchops_") + saved.norm.name() + "_backward";
  }
};

// torch's words, so that what matches on them goes on working.
void check_not_differentiated(const char* op, const char* name, const Tensor& running) {
  TORCH_CHECK(!(running.requires_grad() && at::GradMode::is_enabled()), "The function '", op,
              "' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

void check_not_differentiated(const char* op, const Tensor& running_mean,
                              const Tensor& running_var) {
  check_not_differentiated(op, "running_mean", running_mean);
  check_not_differentiated(op, "running_var", running_var);
}

// Runs `call(save_mask)` below autograd and, where a gradient is wanted, hangs the node on y.
template <class Call>
ForwardOutputs record(const char* op, const Tensor& input, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& residual, const Norm& norm,
                      bool save_mask, Call&& call) {
  check_no_tangents(op, input, weight, bias, residual);
  const bool requires_grad = ag::compute_requires_grad(input, weight, bias, residual);
  ForwardOutputs outputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    outputs = call(save_mask || requires_grad);
  }
  if (!requires_grad) return outputs;
  const auto traits = traits_of(norm.activation);
  const bool masked = traits.maskable && residual.has_value();
  const bool recomputed = traits.needs_z && !masked;
  auto node = make_node<NormBackward>();
  const Tensor r = residual.value_or(Tensor()), w = weight.value_or(Tensor()),
               b = bias.value_or(Tensor());
  node->set_next_edges(ag::collect_next_edges(input, r, w, b));
  node->saved.input = ag::SavedVariable(input, false);
  node->saved.weight = ag::SavedVariable(w, false);
  // residual and bias show up in the backward only where z is recomputed
  node->saved.residual = ag::SavedVariable(recomputed ? r : Tensor(), false);
  node->saved.bias = ag::SavedVariable(recomputed ? b : Tensor(), false);
  node->saved.stats = ag::SavedVariable(std::get<1>(outputs), false);
  node->saved.mask = ag::SavedVariable(masked ? std::get<2>(outputs) : Tensor(), false);
  node->saved.norm = norm;
  ag::set_history(std::get<0>(outputs), node);
  return outputs;
}

ForwardOutputs batch_norm_autograd(const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                   double eps, std::string_view activation, double slope,
                                   bool save_mask, int64_t ghost) {
  static const auto op = find_operator<Train>("batchops::batch_norm");
  const Norm norm{0, true, eps, parse_activation("batch_norm", activation), slope, ghost};
  return record("batch_norm", input, weight, bias, residual, norm, save_mask, [&](bool mask) {
    return op.call(input, weight, bias, residual, eps, activation, slope, mask, ghost);
  });
}

ForwardOutputs batch_norm_update_autograd(const Tensor& input, Tensor& running_mean,
                                          Tensor& running_var, const OptionalTensor& weight,
                                          const OptionalTensor& bias,
                                          const OptionalTensor& residual, double momentum,
                                          double eps, std::string_view activation, double slope,
                                          bool save_mask, int64_t ghost) {
  static const auto op = find_operator<Update>("batchops::batch_norm_update");
  const Norm norm{0, true, eps, parse_activation("batch_norm", activation), slope, ghost};
  check_not_differentiated("batch_norm", running_mean, running_var);
  auto outputs =
      record("batch_norm", input, weight, bias, residual, norm, save_mask, [&](bool mask) {
        return op.call(input, running_mean, running_var, weight, bias, residual, momentum, eps,
                       activation, slope, mask, ghost);
      });
  ag::increment_version(running_mean);
  ag::increment_version(running_var);
  return outputs;
}

ForwardOutputs batch_norm_eval_autograd(const Tensor& input, const Tensor& running_mean,
                                        const Tensor& running_var, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& residual,
                                        double eps, std::string_view activation, double slope,
                                        bool save_mask) {
  static const auto op = find_operator<Eval>("batchops::batch_norm_eval");
  const Norm norm{0, false, eps, parse_activation("batch_norm", activation), slope};
  check_not_differentiated("batch_norm", running_mean, running_var);
  return record("batch_norm", input, weight, bias, residual, norm, save_mask, [&](bool mask) {
    return op.call(input, running_mean, running_var, weight, bias, residual, eps, activation, slope,
                   mask);
  });
}

ForwardOutputs group_norm_autograd(const Tensor& input, int64_t num_groups,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& residual, double eps,
                                   std::string_view activation, double slope, bool save_mask) {
  static const auto op = find_operator<Group>("batchops::group_norm");
  const Norm norm{num_groups, true, eps, parse_activation("group_norm", activation), slope};
  return record("group_norm", input, weight, bias, residual, norm, save_mask, [&](bool mask) {
    return op.call(input, num_groups, weight, bias, residual, eps, activation, slope, mask);
  });
}

// A group for each channel. One that is not there is left to the operator's own check.
Norm instance_of(const Tensor& input, double eps, std::string_view activation, double slope) {
  const int64_t C = input.dim() > 1 ? input.sym_size(1).guard_int(__FILE__, __LINE__) : 0;
  return {C, true, eps, parse_activation("instance_norm", activation), slope};
}

ForwardOutputs instance_norm_autograd(const Tensor& input, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                      double eps, std::string_view activation, double slope,
                                      bool save_mask) {
  static const auto op = find_operator<Instance>("batchops::instance_norm");
  const Norm norm = instance_of(input, eps, activation, slope);
  return record("instance_norm", input, weight, bias, residual, norm, save_mask, [&](bool mask) {
    return op.call(input, weight, bias, residual, eps, activation, slope, mask);
  });
}

ForwardOutputs instance_norm_update_autograd(const Tensor& input, Tensor& running_mean,
                                             Tensor& running_var, const OptionalTensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& residual, double momentum,
                                             double eps, std::string_view activation, double slope,
                                             bool save_mask) {
  static const auto op = find_operator<InstanceUpdate>("batchops::instance_norm_update");
  const Norm norm = instance_of(input, eps, activation, slope);
  check_not_differentiated("instance_norm", running_mean, running_var);
  const auto call = [&](bool mask) {
    return op.call(input, running_mean, running_var, weight, bias, residual, momentum, eps,
                   activation, slope, mask);
  };
  auto outputs = record("instance_norm", input, weight, bias, residual, norm, save_mask, call);
  ag::increment_version(running_mean);
  ag::increment_version(running_var);
  return outputs;
}

}  // namespace

void check_no_tangents(const char* op, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual) {
  const bool found = ag::isFwGradDefined(input) || ag::isFwGradDefined(weight) ||
                     ag::isFwGradDefined(bias) || ag::isFwGradDefined(residual);
  TORCH_CHECK_NOT_IMPLEMENTED(!found, op,
                              ": forward-mode automatic differentiation is not implemented in "
                              "batchops; use torch.nn.functional.",
                              op, " there");
}

TORCH_LIBRARY_IMPL(batchops, Autograd, m) {
  m.impl("batch_norm", &batch_norm_autograd);
  m.impl("batch_norm_update", &batch_norm_update_autograd);
  m.impl("batch_norm_eval", &batch_norm_eval_autograd);
  m.impl("batch_norm_backward", &batch_norm_backward_autograd);
  m.impl("group_norm", &group_norm_autograd);
  m.impl("group_norm_backward", &group_norm_backward_autograd);
  m.impl("instance_norm", &instance_norm_autograd);
  m.impl("instance_norm_update", &instance_norm_update_autograd);
}

}  // namespace batchops::binding
