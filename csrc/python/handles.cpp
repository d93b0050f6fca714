// The objects that an optimizer's parameter lists and states hold: asked when a step is planned, of
// some objects a parameter.
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

// Each item of the lists, and of each non-empty dict in `state` its key, the dict and its values,
// in order.
py::list handles_of(const py::list& lists, const py::dict& state) {
  py::list objects;
  for (const py::handle list : lists) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
      throw py::type_error("expected parameters to be a list or a tuple, got " +
                           std::string(Py_TYPE(list.ptr())->tp_name));
    }
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      objects.append(py::handle(PySequence_Fast_GET_ITEM(list.ptr(), i)));
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
    objects.append(py::handle(key));
    objects.append(py::handle(value));
    Py_ssize_t within = 0;
    PyObject *name, *held;
    while (PyDict_Next(value, &within, &name, &held)) objects.append(py::handle(held));
  }
  return objects;
}

}  // namespace
}  // namespace batchops

void bind_handles(py::module_& m) {
  m.def("handles_of", &batchops::handles_of, py::arg("lists"), py::arg("state"),
        "The objects in a list of lists, and the keys, dicts and values in a dict of dicts");
}
