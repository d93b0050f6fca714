// One access of device code to memory that is watched, as the counters and the race detector take
// it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "memory_map.h"
#include "observer.h"

namespace cuda_emulator {

constexpr unsigned kWarpLanes = 32;

enum class Kind : uint8_t { plain, atomic };

// Who is running; blocks and threads are numbered as in observer.h.
struct Place {
  uint64_t block = 0;
  unsigned thread = 0;

  unsigned warp() const { return thread / kWarpLanes; }
  unsigned lane() const { return thread % kWarpLanes; }
};

struct Access {
  Place place;
  Region* region;
  size_t offset;  // in the region; all of the access lies within
  size_t bytes;
  bool reads, writes;
  Kind kind;
  Scope scope;  // of an atomic
  const void* code;
  unsigned site;  // a small number for `code`
};

}  // namespace cuda_emulator
