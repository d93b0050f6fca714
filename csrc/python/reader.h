// How the module reads tensors: functions of the torch binding, given to it when both are loaded.
#pragma once
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include "collate/tensor_view.h"

namespace batchops::collate {

struct Reader {
  ReadTensor read = nullptr;
  CountWrites count_writes = nullptr;
  PrefetchTensor prefetch_tensor = nullptr;
  PrefetchTensor prefetch_storage = nullptr;
  LetGrow let_grow = nullptr;
  PyTypeObject* tensor_type = nullptr;  // torch.Tensor itself
  PyTypeObject* memmap_type = nullptr;  // numpy.memmap
};

inline Reader reader;

// torch's own threads, for the thread that loaded the module: usually the one that trains.
struct Team {
  RunOnTeam run = nullptr;
  pid_t process = 0;
  pthread_t thread{};

  // A forked child has none of them, and each thread that asks for some would get a set of its own.
  bool is_mine() const {
    return run != nullptr && process == getpid() && pthread_equal(thread, pthread_self()) != 0;
  }
};

inline Team team;

constexpr int kWriteable = 0x0400;  // NPY_ARRAY_WRITEABLE

}  // namespace batchops::collate
