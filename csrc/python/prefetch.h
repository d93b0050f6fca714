// Dicts lie all over memory, and a value is three steps from the pointer to one: dict, keys, value.
#pragma once
#include <pybind11/pybind11.h>

namespace batchops {

inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline void prefetch_dict(PyObject* dict) {
  prefetch(dict);
  prefetch(reinterpret_cast<const char*>(dict) + 32);
}

// Once the dict itself is there: it is looked at.
inline void prefetch_keys(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const auto* const keys =
      reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 4; ++line) prefetch(keys + 64 * line);
}

}  // namespace batchops
