// Takes the place of the toolkit's header of this name: cp.async from global to shared memory.
#pragma once
#include <cstddef>

#include "async_copy.h"

using cuda_emulator::Site;

// The last `zfill` of the bytes written are zero, and as many fewer are read.
inline __attribute__((always_inline)) void __pipeline_memcpy_async(void* shared, const void* global,
                                                                   size_t size, size_t zfill = 0,
                                                                   Site site = Site::current()) {
  cuda_emulator::async_copy(shared, global, size, zfill, site);
}
inline void __pipeline_commit() { cuda_emulator::async_commit(); }
inline void __pipeline_wait_prior(size_t prior, Site site = Site::current()) {
  cuda_emulator::async_wait_prior(prior, site);
}
