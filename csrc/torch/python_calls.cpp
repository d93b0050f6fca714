// Calls of the norms' operators from Python without torch.ops, which makes values of a dynamic type
// of all arguments and results: that takes a third of a small tensor's call. And what batch norm
// does besides.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <utility>

#include "torch/norm.h"

namespace batchops::binding {
namespace {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

// Other classes have a say in what is called with them.
bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type;
}

// An argument of type T on its way from Python. read() is false for what is of another type, or
// would have to be converted: the operator itself has the words for that.
template <class T>
struct Argument;
// Held, so that another thread may give the object another tensor meanwhile.
struct HeldTensor {
  Tensor value;
  bool read(PyObject* object) {
    if (!is_tensor(object)) return false;
    value = THPVariable_Unpack(object);
    return true;
  }
  Tensor& get() { return value; }
};
template <>
struct Argument<const Tensor&> : HeldTensor {};
template <>
struct Argument<Tensor&> : HeldTensor {};
template <>
struct Argument<const OptionalTensor&> {
  OptionalTensor value;
  bool read(PyObject* object) {
    if (object == Py_None) return true;
    if (!is_tensor(object)) return false;
    value = THPVariable_Unpack(object);
    return true;
  }
  const OptionalTensor& get() { return value; }
};
template <>
struct Argument<double> {
  double value = 0;
  bool read(PyObject* object) {
    if (!PyFloat_CheckExact(object)) return false;
    value = PyFloat_AS_DOUBLE(object);
    return true;
  }
  double get() { return value; }
};
template <>
struct Argument<int64_t> {
  int64_t value = 0;
  bool read(PyObject* object) {
    if (!PyLong_CheckExact(object)) return false;
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0;
  }
  int64_t get() { return value; }
};
template <>
struct Argument<bool> {
  bool value = false;
  bool read(PyObject* object) {
    if (!PyBool_Check(object)) return false;
    value = object == Py_True;
    return true;
  }
  bool get() { return value; }
};
template <>
struct Argument<std::string_view> {
  std::string_view value;
  bool read(PyObject* object) {
    if (!PyUnicode_CheckExact(object)) return false;
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) {
      PyErr_Clear();
      return false;
    }
    value = {text, static_cast<size_t>(size)};
    return true;
  }
  std::string_view get() { return value; }
};
template <>
struct Argument<c10::SymIntArrayRef> {
  c10::SmallVector<c10::SymInt, 4> value;
  bool read(PyObject* object) {
    if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
      Argument<int64_t> size;
      if (!size.read(PySequence_Fast_GET_ITEM(object, i))) return false;
      value.emplace_back(size.value);
    }
    return true;
  }
  c10::SymIntArrayRef get() { return value; }
};

// Other Python threads run meanwhile.
class WithoutPython {
 public:
  WithoutPython() : state_(PyEval_SaveThread()) {}
  WithoutPython(const WithoutPython&) = delete;
  WithoutPython& operator=(const WithoutPython&) = delete;
  ~WithoutPython() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

template <class... T, size_t... I>
Tensor first_output(const c10::TypedOperatorHandle<ForwardOutputs(T...)>& op,
                    std::tuple<Argument<T>...>& arguments, std::index_sequence<I...>) {
  const WithoutPython guard;
  return std::get<0>(op.call(std::get<I>(arguments).get()...));
}

// Those that are left out, at the end, are 0, as in the schema.
template <class... T, size_t... I>
bool read_all(std::tuple<Argument<T>...>& arguments, PyObject* const* given, size_t count,
              std::index_sequence<I...>) {
  constexpr std::array<bool, sizeof...(T)> may_be_left_out = {
      (std::is_same_v<T, bool> || std::is_same_v<T, int64_t>)...};
  if (count > sizeof...(T)) return false;
  for (size_t i = count; i < sizeof...(T); ++i) {
    if (!may_be_left_out[i]) return false;
  }
  return ((I >= count || std::get<I>(arguments).read(given[I])) && ...);
}

template <class... T>
PyObject* call(const c10::TypedOperatorHandle<ForwardOutputs(T...)>& op, PyObject* const* given,
               size_t count) {
  std::tuple<Argument<T>...> arguments;
  constexpr std::index_sequence_for<T...> all;
  if (at::impl::torch_function_mode_enabled() || !read_all<T...>(arguments, given, count, all)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  return THPVariable_Wrap(first_output(op, arguments, all));
}

#define BATCHOPS_CALL(function, Signature)                                         \
  PyObject* call_##function(PyObject*, PyObject* const* given, Py_ssize_t count) { \
    HANDLE_TH_ERRORS                                                               \
    static const auto op = find_operator<Signature>("batchops::" #function);       \
    return call(op, given, static_cast<size_t>(count));                            \
    END_HANDLE_TH_ERRORS                                                           \
  }
BATCHOPS_CALL(batch_norm, Train)
BATCHOPS_CALL(batch_norm_update, Update)
BATCHOPS_CALL(batch_norm_eval, Eval)
BATCHOPS_CALL(group_norm, Group)
BATCHOPS_CALL(layer_norm, Layer)
BATCHOPS_CALL(instance_norm, Instance)
BATCHOPS_CALL(instance_norm_update, InstanceUpdate)
#undef BATCHOPS_CALL

// Whether torch's own operator for it would do no more than write: nobody stands between.
bool may_count(const Tensor& counter) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return counter.defined() && is_plain(*counter.unsafeGetTensorImpl()) &&
         local.included_ == c10::default_included_set &&
         !local.excluded_.has(c10::DispatchKey::ADInplaceOrView) &&
         !at::impl::torch_function_mode_enabled() && counter.scalar_type() == at::kLong &&
         counter.numel() == 1 && counter.has_storage();
}

PyObject* count(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  if (Py_TYPE(object) != tensor_type || !may_count(THPVariable_Unpack(object))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& counter = THPVariable_Unpack(object);
  ++*counter.mutable_data_ptr<int64_t>();
  counter.unsafeGetTensorImpl()->bump_version();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

#define BATCHOPS_METHOD(function)                                                       \
  {#function, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_##function)), \
   METH_FASTCALL, "The first output of the operator, or NotImplemented: call it itself."}
PyMethodDef methods[] = {
    BATCHOPS_METHOD(batch_norm),
    BATCHOPS_METHOD(batch_norm_update),
    BATCHOPS_METHOD(batch_norm_eval),
    BATCHOPS_METHOD(group_norm),
    BATCHOPS_METHOD(layer_norm),
    BATCHOPS_METHOD(instance_norm),
    BATCHOPS_METHOD(instance_norm_update),
    {"count", count, METH_O,
     "Adds 1 to a counter on the CPU, as counter.add_(1) does, or gives NotImplemented."},
};
#undef BATCHOPS_METHOD

}  // namespace
}  // namespace batchops::binding

// The functions by the names of their operators.
extern "C" __attribute__((visibility("default"))) PyObject* batchops_norm_calls(
    PyObject* tensor_type, PyObject* parameter_type) {
  namespace binding = batchops::binding;
  binding::tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type);
  binding::parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type);
  PyObject* const calls = PyDict_New();
  if (calls == nullptr) return nullptr;
  for (PyMethodDef& method : binding::methods) {
    PyObject* const function = PyCFunction_New(&method, nullptr);
    const bool added =
        function != nullptr && PyDict_SetItemString(calls, method.ml_name, function) == 0;
    Py_XDECREF(function);
    if (!added) {
      Py_DECREF(calls);
      return nullptr;
    }
  }
  return calls;
}
