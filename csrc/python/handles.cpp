// Whether an optimizer's parameter lists and states still hold the very objects they held before:
// asked before every step, of some objects a parameter. Comparing addresses in Python would take
// as long as the step of a small parameter.
#include <pybind11/pybind11.h>

#include <string>

#include "python/prefetch.h"

namespace py = pybind11;

namespace batchops {
namespace {

// Walks a dict so many steps ahead of who reads it.
template <class Ask>
class Ahead {
 public:
  Ahead(PyObject* dict, int steps, Ask ask) : dict_(dict), ask_(ask) {
    while (steps-- > 0) step();
  }
  void step() {
    PyObject *key, *value;
    if (PyDict_Next(dict_, &at_, &key, &value)) ask_(value);
  }

 private:
  PyObject* const dict_;
  Py_ssize_t at_ = 0;
  const Ask ask_;
};

// f(object) for each item of the lists, and for each non-empty dict in `state` its key, the dict
// and its values; borrowed, in order, until f returns false.
template <class F>
bool for_each_handle(const py::list& lists, const py::dict& state, F&& f) {
  for (const py::handle list : lists) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
      throw py::type_error("expected parameters to be a list or a tuple, got " +
                           std::string(Py_TYPE(list.ptr())->tp_name));
    }
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!f(PySequence_Fast_GET_ITEM(list.ptr(), i))) return false;
    }
  }
  Ahead dicts(state.ptr(), 8, prefetch_dict);
  Ahead keys(state.ptr(), 4, prefetch_keys);
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &at, &key, &value)) {
    dicts.step();
    keys.step();
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) == 0) continue;
    if (!f(key) || !f(value)) return false;
    Py_ssize_t within = 0;
    PyObject *name, *held;
    while (PyDict_Next(value, &within, &name, &held)) {
      if (!f(held)) return false;
    }
  }
  return true;
}

// A Python list, which keeps the objects alive (so that none of their addresses can become
// another's) where the garbage collector sees them.
py::list handles_of(const py::list& lists, const py::dict& state) {
  py::list objects;
  for_each_handle(lists, state, [&](PyObject* object) {
    objects.append(py::handle(object));
    return true;
  });
  return objects;
}

bool same_handles(const py::list& objects, const py::list& lists, const py::dict& state) {
  const auto count = static_cast<Py_ssize_t>(objects.size());
  Py_ssize_t at = 0;
  const bool all = for_each_handle(lists, state, [&](PyObject* object) {
    return at < count && PyList_GET_ITEM(objects.ptr(), at++) == object;
  });
  return all && at == count;
}

}  // namespace
}  // namespace batchops

void bind_handles(py::module_& m) {
  m.def("handles_of", &batchops::handles_of, py::arg("lists"), py::arg("state"),
        "The objects in a list of lists, and the keys, dicts and values in a dict of dicts");
  m.def("same_handles", &batchops::same_handles, py::arg("objects"), py::arg("lists"),
        py::arg("state"), "Whether handles_of(lists, state) gives the very `objects`");
}
