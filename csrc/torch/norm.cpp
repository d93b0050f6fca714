#include "torch/norm.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include "torch/activation.h"
#include "torch/pages.h"

namespace batchops::binding {

void check_norm_input(const char* op, const Tensor& input) {
  TORCH_CHECK(input.dim() >= 2, op, ": expected input of 2 or more dimensions (N, C, *), got ",
              input.dim(), "-D of size ", input.sym_sizes());
  TORCH_CHECK(input.layout() == at::kStrided, op, ": expected a dense input, got layout ",
              input.layout());
  TORCH_CHECK(dtype_of(input.scalar_type()), op,
              ": expected input to be Float, Half, BFloat16 or Double, got ", input.scalar_type());
}

void check_device(const char* op, const char* name, const OptionalTensor& t, const Tensor& input) {
  TORCH_CHECK(!t || t->device() == input.device(), op, ": expected ", name, " on ", input.device(),
              ", where input is, but got it on ", t->device());
}

void check_dtype(const char* op, const char* name, const OptionalTensor& t, const Tensor& input,
                 at::ScalarType& type) {
  if (!t) return;
  const at::ScalarType got = t->scalar_type();
  TORCH_CHECK(got == input.scalar_type() || got == at::kFloat, op, ": expected ", name, " to be ",
              input.scalar_type(),
              input.scalar_type() == at::kFloat ? ", like input," : " (like input) or Float,",
              " but got ", got);
  TORCH_CHECK(type == at::ScalarType::Undefined || type == got, op, ": expected ", name, " to be ",
              type, ", like its companion, but got ", got);
  type = got;
}

void check_per_channel(const char* op, const char* name, const OptionalTensor& t,
                       const Tensor& input) {
  if (!t) return;
  check_device(op, name, t, input);
  // torch's words, so that what matches on them goes on working.
  TORCH_CHECK(t->sym_numel() == input.sym_size(1), op, ": ", name, " should contain ",
              input.sym_size(1), " elements not ", t->sym_numel(),
              ": one for each channel of the input of size ", input.sym_sizes());
  TORCH_CHECK(t->dim() == 1, op, ": expected ", name, " to be 1-D, of size [", input.sym_size(1),
              "], but got size ", t->sym_sizes());
}

void check_affine(const char* op, const Tensor& input, const OptionalTensor& weight,
                  const OptionalTensor& bias) {
  auto type = at::ScalarType::Undefined;
  check_per_channel(op, "weight", weight, input);
  check_dtype(op, "weight", weight, input, type);
  check_per_channel(op, "bias", bias, input);
  check_dtype(op, "bias", bias, input, type);
}

void check_residual(const char* op, const Tensor& input, const OptionalTensor& residual) {
  if (!residual) return;
  check_device(op, "residual", residual, input);
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(), op, ": expected residual to be ",
              input.scalar_type(), " like input, but got ", residual->scalar_type());
  TORCH_CHECK(residual->sym_sizes().equals(input.sym_sizes()), op,
              ": expected residual of input's size ", input.sym_sizes(), ", but got ",
              residual->sym_sizes());
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

Tensor empty_mask(const Dense& x, bool wanted) {
  if (!wanted) return empty_on(x.tensor, {0}, at::kByte);
  const int64_t N = x.tensor.size(0), C = x.tensor.size(1), HxW = spatial_size(x.tensor);
  if (x.layout == Layout::channels_first) {
    return empty_on(x.tensor, {N, C, (HxW + 7) / 8}, at::kByte);
  }
  return empty_on(x.tensor, {N * HxW, (C + 7) / 8}, at::kByte);
}

Tensor empty_like_meta(const Tensor& x) {
  if (x.is_contiguous() || is_channels_last_dense(x)) return at::empty_like(x);
  return at::empty_symint(x.sym_sizes(), x.options(), x.suggest_memory_format());
}

// For the layout that to_dense decides on.
Tensor empty_mask_meta(const Tensor& x, bool wanted) {
  const auto options = x.options().dtype(at::kByte).memory_format(std::nullopt);
  if (!wanted) return at::empty_symint({0}, options);
  const auto sizes = x.sym_sizes();
  c10::SymInt spatial = 1;
  for (size_t d = 2; d < sizes.size(); d++) spatial = spatial * sizes[d];
  const bool rows_of_channels =
      spatial == 1 ||
      (!x.is_contiguous() &&
       // With one channel what would be copied to channels_last is contiguous as well.
       (is_channels_last_dense(x) ||
        (x.suggest_memory_format() != at::MemoryFormat::Contiguous && sizes[1] != 1)));
  if (rows_of_channels) return at::empty_symint({sizes[0] * spatial, (sizes[1] + 7) / 8}, options);
  return at::empty_symint({sizes[0], sizes[1], (spatial + 7) / 8}, options);
}

namespace {

void check_stats(const char* op, const Tensor& input, const Tensor& stats, int64_t columns) {
  TORCH_CHECK(stats.sizes() == at::IntArrayRef({3, columns}) &&
                  stats.scalar_type() == accumulate_type(input) && stats.is_contiguous() &&
                  stats.device() == input.device(),
              op, ": expected stats as the forward returned them, of size [3, ", columns, "], got ",
              stats.sizes(), " ", stats.scalar_type());
}

}  // namespace

bool NormForwardCall::mask_wanted() const {
  return save_mask && residual && traits_of(activation).maskable && input.sym_numel() != 0;
}

NormForwardTensors::NormForwardTensors(const NormForwardCall& call, int64_t columns,
                                       const OptionalTensor& given)
    : x(to_dense(call.input)),
      y(empty_like_dense(x.tensor)),
      mask(empty_mask(x, call.mask_wanted())),
      weight(call.weight),
      bias(call.bias) {
  check_memory(call.op, "input", call.input);
  check_memory(call.op, "weight", call.weight);
  check_memory(call.op, "bias", call.bias);
  check_memory(call.op, "residual", call.residual);
  check_memory(call.op, "stats", given);
  const auto type = accumulate_type(call.input);
  if (given) {
    check_stats(call.op, call.input, *given, columns);
    stats = *given;
  } else if (call.input.numel() == 0) {
    stats = at::zeros({3, columns}, call.input.options().dtype(type).memory_format(std::nullopt));
  } else {
    stats = empty_on(call.input, {3, columns}, type);
  }
  if (call.residual) residual = in_layout_of(*call.residual, x);
}

ForwardOutputs norm_forward_meta(const NormForwardCall& call, const c10::SymInt& columns) {
  const auto options = call.input.options().memory_format(std::nullopt);
  return {empty_like_meta(call.input),
          at::empty_symint({3, columns}, options.dtype(accumulate_type(call.input))),
          empty_mask_meta(call.input, call.mask_wanted())};
}

void NormBackwardCall::check(int64_t columns) const {
  check_norm_input(op, input);
  check_affine(op, input, weight, bias);
  check_residual(op, input, residual);
  TORCH_CHECK(dy.sizes() == input.sizes() && dy.scalar_type() == input.scalar_type() &&
                  dy.device() == input.device(),
              op, ": expected dy of size ", input.sizes(), ", ", input.scalar_type(), ", on ",
              input.device(), ", like input, but got ", dy.sizes(), ", ", dy.scalar_type(), ", on ",
              dy.device());
  check_stats(op, input, stats, columns);
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                        mask->device() == input.device()),
              op, ": expected mask as the forward returned it, contiguous Byte on ", input.device(),
              ", got ", mask->scalar_type(), " on ", mask->device());
}

NormBackwardTensors::NormBackwardTensors(const NormBackwardCall& call)
    : x(call.mask ? in_layout(call.input, layout_of_mask(*call.mask)) : to_dense(call.input)),
      weight(call.weight),
      bias(call.bias) {
  const auto [want_dx, want_dresidual, want_dweight, want_dbias] = call.wanted;
  const int64_t C = call.input.size(1);
  const auto param_type = param_type_of(call.input, call.weight, call.bias);
  const bool empty = call.input.numel() == 0;
  const auto per_channel = [&](bool wanted) {
    if (!wanted) return Tensor();
    if (!empty) return empty_on(call.input, {C}, param_type);
    return at::zeros({C}, call.input.options().dtype(param_type).memory_format(std::nullopt));
  };
  dx = want_dx ? empty_like_dense(x.tensor) : Tensor();
  dresidual = want_dresidual ? empty_like_dense(x.tensor) : Tensor();
  dweight = per_channel(want_dweight);
  dbias = per_channel(want_dbias);
  if (!empty && want_dresidual && call.activation == Activation::none) dresidual.copy_(call.dy);
  done = empty || (call.activation == Activation::none && !want_dx && !want_dweight && !want_dbias);
  if (done) return;
  check_memory(call.op, "input", call.input);
  check_memory(call.op, "residual", call.residual);
  check_memory(call.op, "weight", call.weight);
  check_memory(call.op, "bias", call.bias);
  check_memory(call.op, "stats", call.stats);
  check_memory(call.op, "mask", call.mask);
  check_memory(call.op, "dy", call.dy);
  dy = in_layout_of(call.dy, x);
  if (call.residual && !call.mask) residual = in_layout_of(*call.residual, x);
}

BackwardOutputs norm_backward_meta(const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, std::array<bool, 4> wanted) {
  const auto options =
      input.options().dtype(param_type_of(input, weight, bias)).memory_format(std::nullopt);
  const auto per_channel = [&](bool want) {
    return want ? at::empty_symint({input.sym_size(1)}, options) : Tensor();
  };
  const auto like_input = [&](bool want) { return want ? empty_like_meta(input) : Tensor(); };
  return {like_input(wanted[0]), like_input(wanted[1]), per_channel(wanted[2]),
          per_channel(wanted[3])};
}

}  // namespace batchops::binding
