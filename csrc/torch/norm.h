// What the operators of all norms share: argument checks, outputs, the bit mask, the backward.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "kernels/common.h"
#include "torch/common.h"

namespace batchops::binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;  // y, stats, mask
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dresidual, dweight, dbias

// Signatures of the forward operators.
using Train = ForwardOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, double, std::string_view, double, bool,
                             int64_t);
using Update = ForwardOutputs(const Tensor&, Tensor&, Tensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, double, double,
                              std::string_view, double, bool, int64_t);
using Eval = ForwardOutputs(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, double, std::string_view,
                            double, bool);
using Group = ForwardOutputs(const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, double, std::string_view, double, bool);
using Instance = ForwardOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, double, std::string_view, double, bool);
using InstanceUpdate = ForwardOutputs(const Tensor&, Tensor&, Tensor&, const OptionalTensor&,
                                      const OptionalTensor&, const OptionalTensor&, double, double,
                                      std::string_view, double, bool);
using Layer = ForwardOutputs(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, double, std::string_view,
                             double);

// batchops::name
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The bit mask of kernels/batch_norm.h as a tensor. Its number of dimensions says which layout it
// was written for, since a backward may see the input in another one (saved-tensor hooks):
//   channels_first: [N, C, ceil(HxW / 8)]     channels_last: [N * HxW, ceil(C / 8)]
inline Layout layout_of_mask(const Tensor& mask) {
  return mask.dim() == 3 ? Layout::channels_first : Layout::channels_last;
}

// `stats` and the accumulation inside kernels.
inline at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Of weight and bias, and of their gradients.
inline at::ScalarType param_type_of(const Tensor& input, const OptionalTensor& weight,
                                    const OptionalTensor& bias) {
  return weight ? weight->scalar_type() : bias ? bias->scalar_type() : input.scalar_type();
}

// What an operator asks of its arguments, in the order in which torch's own operators ask it: the
// input, groups or running statistics, then the others. `type` starts undefined and makes tensors
// that belong together have one dtype.
void check_norm_input(const char* op, const Tensor& input);
void check_device(const char* op, const char* name, const OptionalTensor& t, const Tensor& input);
void check_dtype(const char* op, const char* name, const OptionalTensor& t, const Tensor& input,
                 at::ScalarType& type);
void check_per_channel(const char* op, const char* name, const OptionalTensor& t,
                       const Tensor& input);
void check_affine(const char* op, const Tensor& input, const OptionalTensor& weight,
                  const OptionalTensor& bias);
void check_residual(const char* op, const Tensor& input, const OptionalTensor& residual);
// Raises where forward-mode differentiation asks for a derivative of the norm.
void check_no_tangents(const char* op, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual);

// Kernels take no memory for no tensor: what a sharding wrapper has freed must not pass for that.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(!t.defined() || t.numel() == 0 || t.const_data_ptr() != nullptr, op, ": expected ",
              name, " with memory, but that of size ", t.sizes(),
              " has none: was it freed by what shards the model?");
}
inline void check_memory(const char* op, const char* name, const OptionalTensor& t) {
  if (t) check_memory(op, name, *t);
}

// The data of an optional parameter; keeps a contiguous copy alive where one had to be made.
struct Parameter {
  Tensor held;
  const void* data = nullptr;

  explicit Parameter(const OptionalTensor& t) {
    if (!t) return;
    held = t->contiguous();
    data = held.const_data_ptr();
  }
};

Tensor empty_like_dense(const Tensor& x);
Tensor empty_on(const Tensor& x, at::IntArrayRef size, at::ScalarType type);
// The mask for `x`, of no element where none is wanted.
Tensor empty_mask(const Dense& x, bool wanted);
// The same for tensors without data (meta, FakeTensor): the sizes may be symbols.
Tensor empty_like_meta(const Tensor& x);
Tensor empty_mask_meta(const Tensor& x, bool wanted);

inline void* data_or_null(Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
inline const void* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

// The sizes, dtype and layout that both norms' shapes have fields for.
template <class Shape>
Shape norm_shape(const Dense& x, const OptionalTensor& weight, const OptionalTensor& bias,
                 Activation activation, double slope) {
  Shape shape;
  shape.N = x.tensor.size(0);
  shape.C = x.tensor.size(1);
  shape.HxW = spatial_size(x.tensor);
  shape.layout = x.layout;
  shape.dtype = *dtype_of(x.tensor.scalar_type());
  shape.param_dtype = *dtype_of(param_type_of(x.tensor, weight, bias));
  shape.activation = activation;
  shape.slope = slope;
  return shape;
}

// Runs a kernel where `input` is: on torch's threads, or with a workspace on the current stream.
template <class Args>
void launch(const char* op, const Tensor& input, const Args& args,
            const char* (*cpu)(const Args&, const Parallel&),
            size_t (*workspace_cuda)(const Args&, int),
            const char* (*cuda)(const Args&, void*, int, void*)) {
  const char* error = nullptr;
  if (input.is_cpu()) {
    error = cpu(args, torch_threads());
  } else {
    const c10::DeviceGuard guard(input.device());
    const int device = input.device().index();
    const auto bytes = static_cast<int64_t>(workspace_cuda(args, device));
    const Tensor workspace = empty_on(input, {bytes}, at::kByte);
    error = cuda(args, workspace.mutable_data_ptr(), device, current_stream(input.device()));
  }
  TORCH_CHECK(error == nullptr, op, ": ", error);
}

// The arguments of a forward operator, whichever the norm.
struct NormForwardCall {
  const char* op;
  const Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  Activation activation;
  double slope;
  bool save_mask;

  bool mask_wanted() const;
};

// The tensors that a forward's kernel reads and writes.
struct NormForwardTensors {
  Dense x;
  Tensor y, residual, stats, mask;
  Parameter weight, bias;

  // `stats`, three rows of `columns`, are new and zero for an empty input, or those `given`.
  NormForwardTensors(const NormForwardCall& call, int64_t columns, const OptionalTensor& given);
  ForwardOutputs outputs() const { return {y, stats, mask}; }

  // Fills the fields of `Args` that both norms have.
  template <class Args>
  void fill(Args& args) {
    args.x = x.tensor.const_data_ptr();
    args.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    args.weight = weight.data;
    args.bias = bias.data;
    args.y = y.mutable_data_ptr();
    args.stats = stats.mutable_data_ptr();
    args.mask = mask.numel() != 0 ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  }
};

ForwardOutputs norm_forward_meta(const NormForwardCall& call, const c10::SymInt& columns);

// The arguments of a backward operator, whichever the norm.
struct NormBackwardCall {
  const char* op;
  const Tensor& dy;
  const Tensor& input;
  const OptionalTensor& residual;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const Tensor& stats;
  const OptionalTensor& mask;
  Activation activation;
  double slope;
  std::array<bool, 4> wanted;  // dx, dresidual, dweight, dbias

  // Raises where dy, stats (three rows of `columns`) or mask are not as the forward left them.
  void check(int64_t columns) const;
};

// The tensors that a backward's kernel reads and writes.
struct NormBackwardTensors {
  Dense x;
  Tensor dy, residual, dx, dresidual, dweight, dbias;
  Parameter weight, bias;
  bool done = false;  // nothing is left for a kernel

  explicit NormBackwardTensors(const NormBackwardCall& call);
  BackwardOutputs outputs() const { return {dx, dresidual, dweight, dbias}; }

  // Fills the fields of `Args` that both norms have.
  template <class Args>
  void fill(Args& args, const NormBackwardCall& call) {
    TORCH_CHECK(!call.mask || call.mask->numel() == args.shape.mask_bytes(), call.op,
                ": expected a mask of ", args.shape.mask_bytes(),
                " bytes as the forward returned it, got ", call.mask ? call.mask->numel() : 0);
    args.dy = dy.const_data_ptr();
    args.x = x.tensor.const_data_ptr();
    args.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    args.weight = weight.data;
    args.bias = bias.data;
    args.stats = call.stats.const_data_ptr();
    args.mask = call.mask ? call.mask->template const_data_ptr<uint8_t>() : nullptr;
    args.dx = data_or_null(dx);
    args.dresidual = call.activation == Activation::none ? nullptr : data_or_null(dresidual);
    args.dweight = data_or_null(dweight);
    args.dbias = data_or_null(dbias);
  }
};

BackwardOutputs norm_backward_meta(const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, std::array<bool, 4> wanted);

}  // namespace batchops::binding
