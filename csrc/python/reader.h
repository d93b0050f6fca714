// How the module reads tensors: functions of the torch binding, given to it when both are loaded.
#pragma once
#include <pybind11/pybind11.h>

#include "collate/tensor_view.h"

namespace batchops::collate {

struct Reader {
  ReadTensor read = nullptr;
  CountWrites count_writes = nullptr;
  PrefetchTensor prefetch_tensor = nullptr;
  PrefetchTensor prefetch_storage = nullptr;
  PyTypeObject* tensor_type = nullptr;  // torch.Tensor itself
  PyTypeObject* memmap_type = nullptr;  // numpy.memmap
};

inline Reader reader;

constexpr int kWriteable = 0x0400;  // NPY_ARRAY_WRITEABLE

}  // namespace batchops::collate
