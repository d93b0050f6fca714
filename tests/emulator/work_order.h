// Which work of the host's streams (grids, copies, memsets) comes after which: a vector clock by
// stream. Running one after the other in the emulator orders nothing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>

namespace cuda_emulator {

// By stream, the number of the last work that is sure to be over. Work is numbered over all
// streams.
using WorkClock = std::map<uint32_t, uint64_t>;

inline void add(WorkClock& clock, const WorkClock& other) {
  for (const auto& [stream, number] : other) {
    clock[stream] = std::max(clock[stream], number);
  }
}

struct WorkOrder {
  uint32_t stream = 0;
  uint64_t number = 0;
  WorkClock after;  // this work included

  bool comes_after(const WorkOrder& other) const {
    const auto found = after.find(other.stream);
    return found != after.end() && found->second >= other.number;
  }
};

}  // namespace cuda_emulator
