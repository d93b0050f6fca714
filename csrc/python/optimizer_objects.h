// The Python objects that an optimizer's step rests on: asked in every step, of some objects a
// parameter. Comparing addresses in Python would take as long as the step of a small parameter.
#pragma once
#include "python/prefetch.h"

namespace batchops {

// f(object) for each parameter in a list of lists, and for each non-empty dict in the dict `state`
// its key, the dict and its values; in order, until f returns false. refuse(what, object) raises
// where `object` is not what was expected. With the GIL.
template <class Refuse, class F>
bool for_each_object(PyObject* lists, PyObject* state, Refuse&& refuse, F&& f) {
  if (!PyDict_Check(state)) refuse("an optimizer's states to be a dict", state);
  const Py_ssize_t list_count = PyList_GET_SIZE(lists);
  for (Py_ssize_t k = 0; k < list_count; ++k) {
    PyObject* const list = PyList_GET_ITEM(lists, k);
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
      refuse("parameters to be a list or a tuple", list);
    }
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!f(PySequence_Fast_GET_ITEM(list, i))) return false;
    }
  }
  // Of dicts further on first the dict, then its keys.
  struct {
    Py_ssize_t at = 0;
    PyObject *key, *value;
  } here, dicts, keys;
  const auto step = [&](auto& walk) {
    return PyDict_Next(state, &walk.at, &walk.key, &walk.value) != 0;
  };
  const auto ask_for_dict = [&] {
    if (step(dicts)) prefetch_dict(dicts.value);
  };
  const auto ask_for_keys = [&] {
    if (step(keys)) prefetch_keys(keys.value);
  };
  for (int k = 0; k < 8; ++k) ask_for_dict();
  for (int k = 0; k < 4; ++k) ask_for_keys();
  while (step(here)) {
    ask_for_dict();
    ask_for_keys();
    if (!PyDict_Check(here.value) || PyDict_GET_SIZE(here.value) == 0) continue;
    if (!f(here.key) || !f(here.value)) return false;
    Py_ssize_t at = 0;
    PyObject *name, *held;
    while (PyDict_Next(here.value, &at, &name, &held)) {
      if (!f(held)) return false;
    }
  }
  return true;
}

}  // namespace batchops
