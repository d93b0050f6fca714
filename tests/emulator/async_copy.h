// cp.async: a copy that happens at some time between its issue and the wait for it. Here the
// destination is poison until the wait, and the source is read at the wait: so a missing wait
// shows, and so does a source that is overwritten too early.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "settings.h"

namespace cuda_emulator {

// Of one thread.
class AsyncCopies {
 public:
  void clear();
  void issue(void* to, const void* from, size_t bytes, size_t zeros, const void* code);
  void commit() { ++commits_; }
  // Completes all but the last `prior` batches.
  void wait_prior(size_t prior);

 private:
  struct Copy {
    uint64_t id;
    uint64_t batch;
    void* to;
    const void* from;
    size_t bytes, zeros;
  };
  std::vector<Copy> copies_;
  uint64_t commits_ = 0;
};

// For the running thread; throws Error for a size, alignment or memory that cp.async does not take.
void async_copy(void* to, const void* from, size_t size, size_t zeros, const Site& site);
void async_commit();
void async_wait_prior(size_t prior, const Site& site);

}  // namespace cuda_emulator
