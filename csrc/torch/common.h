// What every operator file of the torch binding shares: threads, streams, dtypes, layouts, nodes.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "kernels/common.h"

namespace batchops::binding {

// torch's own pool of threads. Inside a parallel region at::parallel_for runs serially.
inline Parallel torch_threads() {
  Parallel par;
  par.run = [](void*, int64_t count, Parallel::Body body, void* data) {
    at::parallel_for(0, count, /*grain_size=*/1,
                     [&](int64_t begin, int64_t end) { body(data, begin, end); });
  };
  par.threads = at::get_num_threads();
  return par;
}

// The framework's current stream, through libc10 alone: so one binding serves CPU and CUDA torch.
inline void* current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Keys of a dense tensor in host memory. Any other key (conjugate, negative, functorch, Python,
// sparse, nested, quantized) says that its bytes are not all there is to it.
inline bool is_plain(const c10::TensorImpl& impl) {
  constexpr auto allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  const c10::DispatchKeySet keys = impl.key_set();
  return keys.has_all(c10::DispatchKeySet(c10::DispatchKey::CPU)) &&
         (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::f32;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    case at::kDouble:
      return DType::f64;
    default:
      return std::nullopt;
  }
}

inline const char* name_of(Activation activation) {
  switch (activation) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return #name;
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
  return "";
}

inline Activation parse_activation(const char* op, std::string_view text) {
#define BATCHOPS_PARSE(name, functor) \
  if (text == #name) return Activation::name;
  BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_PARSE)
#undef BATCHOPS_PARSE
  std::string known;
#define BATCHOPS_LIST(name, functor) known += known.empty() ? "'" #name "'" : ", '" #name "'";
  BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_LIST)
#undef BATCHOPS_LIST
  TORCH_CHECK_VALUE(false, op, ": activation must be one of ", known, ", got '", std::string(text),
                    "'");
}

inline int64_t spatial_size(const at::Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 2; d < x.dim(); d++) size *= x.size(d);
  return size;
}

// Dense in memory with the channel innermost: (N, spatial..., C).
inline bool is_channels_last_dense(const at::Tensor& x) {
  const auto sizes = x.sym_sizes();
  const auto strides = x.sym_strides();
  c10::SymInt expected = 1;
  const auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected = expected * sizes[d];
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = x.dim() - 1; d >= 2; d--) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

struct Dense {
  at::Tensor tensor;
  Layout layout;
};

// `x` itself where it is dense in one of the two layouts, else one copy in the memory format torch
// suggests for its strides.
inline Dense to_dense(const at::Tensor& x) {
  if (x.is_contiguous()) {
    const bool one_pixel = spatial_size(x) == 1;
    return {x, one_pixel ? Layout::channels_last : Layout::channels_first};
  }
  if (is_channels_last_dense(x)) return {x, Layout::channels_last};
  return to_dense(x.contiguous(x.suggest_memory_format()));
}

// `x` in the given layout, copied once where it is not.
inline Dense in_layout(const at::Tensor& x, Layout layout) {
  Dense dense = to_dense(x);
  if (dense.layout == layout) return dense;
  if (layout == Layout::channels_first) return {x.contiguous(), layout};
  return {x.movedim(1, -1).contiguous().movedim(-1, 1), layout};
}

// `t`, of the size of `like.tensor`, in the very layout of `like`.
inline at::Tensor in_layout_of(const at::Tensor& t, const Dense& like) {
  const bool fits = t.is_contiguous()
                        ? like.tensor.is_contiguous()
                        : like.layout == Layout::channels_last && is_channels_last_dense(t);
  if (fits) return t;
  return at::empty_like(like.tensor).copy_(t);
}

// Nodes are counted by shared_ptr up to some torch minor version and by intrusive_ptr after it.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<N>();
  } else {
    // found by argument-dependent lookup where it exists: frees long chains without recursion
    return std::shared_ptr<N>(new N(), [](N* node) { deleteNode(node); });
  }
}

inline std::optional<at::Tensor> defined_or_none(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

}  // namespace batchops::binding
