// Whether the columns that a Table has the addresses of are still what they were: asked before
// every batch. From Python each question to a tensor is a call, and most let go of the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "python/reader.h"

namespace py = pybind11;

namespace batchops::collate {
namespace {

class Watch {
 public:
  static std::optional<Watch> of(const py::sequence& columns) {
    Watch watch;
    for (const py::handle column : columns) {
      State state;
      if (!read(column.ptr(), &state)) return std::nullopt;
      state.object = py::reinterpret_borrow<py::object>(column);
      state.own_sizes.assign(state.sizes, state.sizes + state.dim);
      state.own_strides.assign(state.strides, state.strides + state.dim);
      watch.states_.push_back(std::move(state));
    }
    return watch;
  }

  bool same() const {
    return std::all_of(states_.begin(), states_.end(), [](const State& was) {
      State is;
      return read(was.object.ptr(), &is) && is.data == was.data && is.dim == was.dim &&
             is.type == was.type && is.dtype == was.dtype && is.writeable == was.writeable &&
             std::equal(is.sizes, is.sizes + is.dim, was.own_sizes.begin()) &&
             std::equal(is.strides, is.strides + is.dim, was.own_strides.begin());
    });
  }

  std::vector<int64_t> writes() const {
    std::vector<int64_t> counts;
    for (const State& state : states_) {
      if (state.type == reader.tensor_type) {
        counts.push_back(reader.count_writes(state.object.ptr()));
      }
    }
    return counts;
  }

 private:
  struct State {
    py::object object;
    PyTypeObject* type = nullptr;
    const void* data = nullptr;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;
    int64_t dim = 0;
    intptr_t dtype = 0;
    bool writeable = true;
    std::vector<int64_t> own_sizes;
    std::vector<int64_t> own_strides;
  };

  static bool read(PyObject* column, State* state) {
    state->type = Py_TYPE(column);
    if (state->type == reader.tensor_type) {
      TensorView view;
      if (!reader.read(column, &view) || reader.count_writes(column) < 0) return false;
      state->data = view.data;
      state->sizes = view.sizes;
      state->strides = view.strides;
      state->dim = view.dim;
      state->dtype = view.dtype;
      return true;
    }
    static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
    if (state->type != py::detail::npy_api::get().PyArray_Type_ &&
        state->type != reader.memmap_type) {
      return false;
    }
    const auto* const array = py::detail::array_proxy(column);
    state->data = array->data;
    state->sizes = reinterpret_cast<const int64_t*>(array->dimensions);
    state->strides = reinterpret_cast<const int64_t*>(array->strides);
    state->dim = array->nd;
    state->dtype = reinterpret_cast<intptr_t>(array->descr);
    state->writeable = (array->flags & kWriteable) != 0;
    return true;
  }

  std::vector<State> states_;
};

}  // namespace
}  // namespace batchops::collate

void bind_columns(py::module_& m) {
  using batchops::collate::Watch;

  py::class_<Watch>(m, "Watch", "What tensors and arrays were when it was made")
      .def_static(
          "of", &Watch::of, py::arg("columns"),
          "None where one is more than bytes with strides in host memory, or torch does not "
          "count writes to it")
      .def("same", &Watch::same, "Whether all still lie there, with these shapes and types")
      .def("writes", &Watch::writes, "How often torch counted a write to each of the tensors");
}
