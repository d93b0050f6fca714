// torch.ops.batchops.instance_norm and instance_norm_update: schemas, checks, allocation and
// launch; autograd in norm_autograd.cpp. The backward is group norm's, with a group for each
// channel.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <sstream>

#include "kernels/batch_norm.h"
#include "kernels/group_norm.h"
#include "torch/norm.h"

namespace batchops::binding {
namespace {

constexpr const char* kInstanceNorm = "instance_norm";

void check_instances(const NormForwardCall& call, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var) {
  const Tensor& input = call.input;
  check_norm_input(kInstanceNorm, input);
  c10::SymInt positions = 1;
  for (int64_t d = 2; d < input.dim(); d++) positions = positions * input.sym_size(d);
  if (positions == 1) {
    // torch's words, so that what matches on them goes on working.
    std::ostringstream sizes;
    sizes << input.sym_sizes();
    TORCH_CHECK_VALUE(false,
                      "Expected more than 1 spatial element when training, got input size "
                      "torch.Size(",
                      sizes.str(), ")");
  }
  check_per_channel(kInstanceNorm, "running_mean", running_mean, input);
  check_per_channel(kInstanceNorm, "running_var", running_var, input);
  check_affine(kInstanceNorm, input, call.weight, call.bias);
  check_residual(kInstanceNorm, input, call.residual);
}

ForwardOutputs instance_norm(const Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                             std::string_view activation, double slope, bool save_mask) {
  const NormForwardCall call{kInstanceNorm, input,    weight,
                             bias,          residual, parse_activation(kInstanceNorm, activation),
                             slope,         save_mask};
  check_instances(call, {}, {});
  NormForwardTensors tensors(call, input.size(0) * input.size(1), {});
  if (input.numel() == 0) return tensors.outputs();
  GroupNormForward args;
  args.shape = norm_shape<GroupNormShape>(tensors.x, weight, bias, call.activation, slope);
  args.shape.G = args.shape.C;
  args.eps = eps;
  tensors.fill(args);
  launch(kInstanceNorm, input, args, group_norm_forward_cpu, group_norm_forward_workspace_cuda,
         group_norm_forward_cuda);
  return tensors.outputs();
}

// Null stays null.
const void* ahead(const void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const char*>(p) + bytes;
}
void* ahead(void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<char*>(p) + bytes;
}

// running += momentum · (average over the samples - running)
void update(Tensor& running, const Tensor& of_instances, double momentum) {
  const Tensor average = of_instances.view({-1, running.size(0)}).to(at::kDouble).mean(0);
  running.copy_(running.to(at::kDouble).lerp(average, momentum));
}

// Instances are the channels of a batch of one sample, and batch norm's kernels give the variance
// of each, in which 1 / sqrt(var + eps), all that group norm's leave of it, has no more part where
// it is small against eps. Contiguous memory is one such batch, channels_last one for each sample.
ForwardOutputs instance_norm_update(const Tensor& input, Tensor& running_mean, Tensor& running_var,
                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& residual, double momentum, double eps,
                                    std::string_view activation, double slope, bool save_mask) {
  const NormForwardCall call{kInstanceNorm, input,    weight,
                             bias,          residual, parse_activation(kInstanceNorm, activation),
                             slope,         save_mask};
  check_instances(call, running_mean, running_var);
  const int64_t N = input.size(0), C = input.size(1);
  NormForwardTensors tensors(call, N * C, {});
  if (input.numel() == 0) return tensors.outputs();
  check_memory(kInstanceNorm, "running_mean", running_mean);
  check_memory(kInstanceNorm, "running_var", running_var);

  const int64_t batches = tensors.x.layout == Layout::channels_first ? 1 : N;
  const int64_t channels = N * C / batches;
  const auto of_channels = [&](const OptionalTensor& t) {
    return Parameter(t && channels != C ? OptionalTensor(t->repeat({channels / C})) : t);
  };
  tensors.weight = of_channels(weight);
  tensors.bias = of_channels(bias);
  const auto type = accumulate_type(input);
  const auto options = input.options().dtype(type).memory_format(std::nullopt);
  Tensor stats = batches == 1 ? tensors.stats : at::empty({batches, 3, channels}, options);
  // With a momentum of 1 all of the way from 0 to each instance's.
  Tensor mean = at::zeros({batches, channels}, options), var = at::zeros_like(mean);

  BatchNormForward all;
  all.shape = norm_shape<BatchNormShape>(tensors.x, weight, bias, call.activation, slope);
  all.shape.N = 1;
  all.shape.C = channels;
  all.shape.running_dtype = *dtype_of(type);
  all.momentum = 1;
  all.eps = eps;
  tensors.fill(all);
  const int64_t bytes = tensors.x.tensor.nbytes() / batches;
  const int64_t row = channels * stats.itemsize();
  for (int64_t n = 0; n < batches; n++) {
    BatchNormForward args = all;
    args.x = ahead(all.x, n * bytes);
    args.residual = ahead(all.residual, n * bytes);
    args.y = ahead(all.y, n * bytes);
    args.mask = static_cast<uint8_t*>(ahead(all.mask, n * all.shape.mask_bytes()));
    args.stats = ahead(stats.mutable_data_ptr(), n * 3 * row);
    args.running_mean = ahead(mean.mutable_data_ptr(), n * row);
    args.running_var = ahead(var.mutable_data_ptr(), n * row);
    launch(kInstanceNorm, input, args, batch_norm_forward_cpu, batch_norm_forward_workspace_cuda,
           batch_norm_forward_cuda);
  }
  if (batches != 1) tensors.stats.view({3, N, C}).copy_(stats.transpose(0, 1));
  update(running_mean, mean, momentum);
  update(running_var, var, momentum);
  return tensors.outputs();
}

// --- shapes without data: meta tensors, FakeTensor, torch.compile, export ------------------------

ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            std::string_view activation, double slope, bool save_mask) {
  const NormForwardCall call{kInstanceNorm, input,    weight,
                             bias,          residual, parse_activation(kInstanceNorm, activation),
                             slope,         save_mask};
  check_instances(call, running_mean, running_var);
  return norm_forward_meta(call, input.sym_size(0) * input.sym_size(1));
}

ForwardOutputs instance_norm_meta(const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                  double, std::string_view activation, double slope,
                                  bool save_mask) {
  return forward_meta(input, {}, {}, weight, bias, residual, activation, slope, save_mask);
}

ForwardOutputs instance_norm_update_meta(const Tensor& input, Tensor& running_mean,
                                         Tensor& running_var, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         double, double, std::string_view activation, double slope,
                                         bool save_mask) {
  return forward_meta(input, running_mean, running_var, weight, bias, residual, activation, slope,
                      save_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // y, and what the backward needs: statistics [3, N * C], and a bit mask or an empty tensor.
  m.def(
      "instance_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope=0.01, bool save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "instance_norm_update(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, "
      "str activation, float slope=0.01, bool save_mask=False) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
}

#define BATCHOPS_IMPLEMENT(m, suffix)                \
  (m).impl("instance_norm", &instance_norm##suffix); \
  (m).impl("instance_norm_update", &instance_norm_update##suffix)

TORCH_LIBRARY_IMPL(batchops, CPU, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, CUDA, m) { BATCHOPS_IMPLEMENT(m, ); }
TORCH_LIBRARY_IMPL(batchops, Meta, m) { BATCHOPS_IMPLEMENT(m, _meta); }
#undef BATCHOPS_IMPLEMENT

}  // namespace batchops::binding
