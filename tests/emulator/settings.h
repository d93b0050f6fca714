// What tests choose: the schedule, and the size of the device. Set through control.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace cuda_emulator {

// What real hardware would answer with a hang, garbage or a launch failure. Names the kernel, the
// block, the thread, the source line and the schedule.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;
std::string where(const Site& site);

// The order in which waiting threads, blocks and streams get their turn.
enum class Order { forward, reverse, random };

// The limits are Hopper's.
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;
  // Blocks in flight together, except in a cooperative launch, which has all of them in flight. A
  // cluster is in flight as a whole, however many blocks it has.
  int resident_blocks = 1;
  int multiprocessors = 2;
  // Blocks of a cooperative grid or of a cluster that a process may have at once, whatever the
  // occupancy calls answer; 0: all of them.
  int blocks_held = 0;
  int blocks_per_multiprocessor = 0;  // what the occupancy calls answer; 0: computed (kernel.h)
  bool registers_required = false;    // a kernel must be in the table of set_registers
  size_t static_shared_limit = 48 * 1024;
  size_t shared_limit = 227 * 1024;
  int compute_major = 9;  // what cudaDevAttrComputeCapabilityMajor answers
  // The architecture that the kernels were compiled for, as 80; 0: the device's. An older one is
  // what a device makes its machine code from.
  int code_version = 0;
  // Rounds in which threads only spin and nothing changes, after which their wait counts as a
  // deadlock. A spin that meets barriers on the way, or looks at several places, gets a hundred
  // times as many: what goes on around it may be work.
  int spin_rounds = 1000;
};
Settings& settings();

// Begins the order anew: the same seed then gives the same run.
void restart_schedule();
// A number below `count`, from the seed.
uint64_t random_below(uint64_t count);
// "(random schedule, seed 7, 3 resident blocks)"
std::string schedule_text();

}  // namespace cuda_emulator
