// What the collator needs of torch's C++: where a Python tensor keeps its bytes, and threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/COW.h>
#include <torch/csrc/autograd/python_variable.h>

#include "collate/tensor_view.h"
#include "torch/common.h"

namespace {

// Of the versions of torch that have named dimensions; stacking keeps them.
template <class Impl>
bool has_names(const Impl& impl) {
  if constexpr (requires { impl.has_named_tensor_meta(); }) {
    return impl.has_named_tensor_meta();
  } else {
    return false;
  }
}

// A forward-mode tangent would be lost.
bool has_tangent(const at::Tensor& tensor) {
  const auto* meta = tensor.unsafeGetTensorImpl()->autograd_meta();
  return meta != nullptr && meta->fw_grad(/*level=*/0, tensor).defined();
}

}  // namespace

// Samples are all over memory, and reading one is four steps from pointer to pointer: the first
// ones of later samples are asked for ahead.
extern "C" __attribute__((visibility("default"))) void batchops_prefetch_tensor(void* object) {
  const c10::TensorImpl* const impl =
      THPVariable_Unpack(static_cast<PyObject*>(object)).unsafeGetTensorImpl();
  const auto* const bytes = reinterpret_cast<const char*>(impl);
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) {
    __builtin_prefetch(bytes + line);
  }
}

extern "C" __attribute__((visibility("default"))) void batchops_prefetch_storage(void* object) {
  const c10::TensorImpl& impl =
      *THPVariable_Unpack(static_cast<PyObject*>(object)).unsafeGetTensorImpl();
  if (!impl.has_storage()) return;
  const auto* const bytes =
      reinterpret_cast<const char*>(impl.unsafe_storage().unsafeGetStorageImpl());
  __builtin_prefetch(bytes);
  __builtin_prefetch(bytes + 64);
  __builtin_prefetch(impl.autograd_meta());
}

// `object` is a Python object whose type is exactly torch.Tensor.
extern "C" __attribute__((visibility("default"))) bool batchops_read_tensor(
    void* object, batchops::collate::TensorView* view) {
  const at::Tensor& tensor = THPVariable_Unpack(static_cast<PyObject*>(object));
  if (!tensor.defined()) return false;
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (!batchops::binding::is_plain(impl) || impl.requires_grad() || !impl.has_storage() ||
      impl.is_python_dispatch() || has_names(impl)) {
    return false;
  }
  const caffe2::TypeMeta dtype = impl.dtype();
  if (has_tangent(tensor)) return false;
  view->data = tensor.const_data_ptr();
  view->sizes = impl.sizes().data();
  view->strides = impl.strides().data();
  view->dim = impl.dim();
  view->dtype = static_cast<int32_t>(dtype.toScalarType());
  view->item_bytes = static_cast<int32_t>(dtype.itemsize());
  return true;
}

extern "C" __attribute__((visibility("default"))) int64_t batchops_count_writes(void* object) {
  const at::Tensor& tensor = THPVariable_Unpack(static_cast<PyObject*>(object));
  c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (impl.is_inference() || !impl.has_storage()) return -1;
  const c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
  if (c10::impl::cow::is_cow_data_ptr(storage.data_ptr())) return -1;
  return impl.version_counter().current_version();
}

// Memory that is not torch's becomes torch's when it has to be larger, as that of its own tensors.
extern "C" __attribute__((visibility("default"))) void batchops_let_grow(void* object) {
  const at::Tensor& tensor = THPVariable_Unpack(static_cast<PyObject*>(object));
  c10::StorageImpl& storage =
      *tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  storage.set_allocator(c10::GetCPUAllocator());
  storage.set_resizable(true);
}

extern "C" __attribute__((visibility("default"))) void batchops_run_on_team(int32_t threads,
                                                                            void (*work)(void*),
                                                                            void* argument) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(argument);
  });
}
