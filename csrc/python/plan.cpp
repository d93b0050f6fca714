// Binds the planning of batches by length. Plans are read as arrays that own their memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <span>

#include "collate/plan.h"

namespace py = pybind11;

namespace batchops::collate {
namespace {

template <class T>
py::array_t<T> to_array(Large<T> values) {
  auto* const held = new Large<T>(std::move(values));
  const py::capsule owner(held, [](void* p) { delete static_cast<Large<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(held->size()), held->data(), owner);
}

py::tuple plan(const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& lengths,
               int64_t max_tokens, int64_t max_samples, int64_t multiple, bool padded, bool shuffle,
               int64_t pool, bool skip_oversized, uint64_t seed) {
  if (lengths.ndim() != 1 || lengths.size() >= std::numeric_limits<int32_t>::max()) {
    throw py::value_error("plan: lengths: expected a vector of fewer than 2^31, got " +
                          std::to_string(lengths.ndim()) + " dimensions and " +
                          std::to_string(lengths.size()) + " items");
  }
  const std::span<const int64_t> data(lengths.data(), static_cast<size_t>(lengths.size()));
  PlanOptions options;
  options.max_tokens = max_tokens;
  options.max_samples = max_samples;
  options.multiple = multiple;
  options.padded = padded;
  options.shuffle = shuffle;
  options.pool = pool;
  options.skip_oversized = skip_oversized;
  options.seed = seed;
  Plan made;
  auto bad = data.end();
  {
    const py::gil_scoped_release release;
    bad = std::find_if(data.begin(), data.end(), [](int64_t length) {
      return length < 0 || length > std::numeric_limits<int32_t>::max();
    });
    if (bad == data.end()) made = plan_batches(data, options);
  }
  if (bad != data.end()) {
    throw py::value_error("plan: lengths: expected in [0, 2^31), got " + std::to_string(*bad) +
                          " for sample " + std::to_string(bad - data.begin()));
  }
  return py::make_tuple(to_array(std::move(made.samples)), to_array(std::move(made.starts)));
}

}  // namespace
}  // namespace batchops::collate

void bind_plan(py::module_& m) {
  using namespace batchops::collate;

  m.def("plan_batches", &plan, py::arg("lengths"), py::arg("max_tokens") = 0,
        py::arg("max_samples") = 0, py::arg("multiple") = 1, py::arg("padded") = true,
        py::arg("shuffle") = true, py::arg("pool") = 0, py::arg("skip_oversized") = false,
        py::arg("seed") = 0,
        "(samples, starts): batch b is samples[starts[b]:starts[b + 1]]; releases the GIL");
  m.def(
      "permutation",
      [](int64_t n, uint64_t seed) {
        if (n < 0) {
          throw py::value_error("permutation: n: expected >= 0, got " + std::to_string(n));
        }
        return to_array(permutation(n, seed));
      },
      py::arg("n"), py::arg("seed"));
}
