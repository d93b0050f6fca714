// batchops._C: what holds Python objects or nothing of torch at all.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "kernels/info.h"

namespace py = pybind11;

void bind_collate(py::module_& m);
void bind_columns(py::module_& m);
void bind_handles(py::module_& m);
void bind_plan(py::module_& m);
void bind_ring(py::module_& m);
void bind_samples(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of batchops that do not depend on torch";
  m.def("built_with_cuda", &batchops::built_with_cuda);
  m.def("cuda_targets", &batchops::cuda_targets);
  m.def("cuda_toolkit_version", &batchops::cuda_toolkit_version);
  m.def("cuda_driver_version", &batchops::cuda_driver_version);
  m.def("cuda_device_count", [] {
    const char* message = nullptr;
    const int count = batchops::cuda_device_count(&message);
    return py::make_tuple(count, message ? py::cast(message) : py::none());
  });
  m.def(
      "cuda_problem",
      [](int device) -> std::optional<std::string> {
        // A first use of the device loads what there is for it, and locked pages are all touched:
        // other threads go on meanwhile.
        const py::gil_scoped_release no_gil;
        const char* problem = batchops::cuda_problem(device);
        return problem == nullptr ? std::nullopt : std::optional<std::string>(problem);
      },
      py::arg("device"));
  m.def(
      "cuda_lock_pages",
      [](uintptr_t address, size_t bytes, int device) {
        return batchops::cuda_lock_pages(reinterpret_cast<void*>(address), bytes, device);
      },
      py::arg("address"), py::arg("bytes"), py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_unlock_pages",
      [](uintptr_t address, int device) {
        return batchops::cuda_unlock_pages(reinterpret_cast<void*>(address), device);
      },
      py::arg("address"), py::arg("device"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", &batchops::cpu_capability);
  bind_collate(m);
  bind_columns(m);
  bind_handles(m);
  bind_plan(m);
  bind_ring(m);
  bind_samples(m);
}
