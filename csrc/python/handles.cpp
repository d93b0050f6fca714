// What an optimizer's parameter lists and states hold, as Python sees it.
#include <pybind11/pybind11.h>

#include <string>

#include "python/optimizer_objects.h"

namespace py = pybind11;

namespace batchops {
namespace {

py::list handles_of(const py::list& lists, const py::dict& state) {
  py::list objects;
  const auto refuse = [](const char* expected, PyObject* object) {
    throw py::type_error(std::string("expected ") + expected + ", got " + Py_TYPE(object)->tp_name);
  };
  for_each_object(lists.ptr(), state.ptr(), refuse, [&](PyObject* object) {
    objects.append(py::handle(object));
    return true;
  });
  return objects;
}

}  // namespace
}  // namespace batchops

void bind_handles(py::module_& m) {
  m.def("handles_of", &batchops::handles_of, py::arg("lists"), py::arg("state"),
        "The objects in a list of lists, and the keys, dicts and values in a dict of dicts");
}
