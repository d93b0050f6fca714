// batchops._C: what holds Python objects or nothing of torch at all.
#include <pybind11/pybind11.h>

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
  m.def("cpu_capability", &batchops::cpu_capability);
  bind_collate(m);
  bind_columns(m);
  bind_handles(m);
  bind_plan(m);
  bind_ring(m);
  bind_samples(m);
}
