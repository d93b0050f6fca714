// What Python calls to steer the emulator (emulator.py).
#include "control.h"

#include <cstring>

extern "C" {

// "forward", "reverse" or "random"; the seed counts for the last.
int emulator_set_order(const char* order, uint64_t seed) {
  auto& settings = cuda_emulator::settings();
  settings.seed = seed;
  if (std::strcmp(order, "forward") == 0) {
    settings.order = cuda_emulator::Order::forward;
  } else if (std::strcmp(order, "reverse") == 0) {
    settings.order = cuda_emulator::Order::reverse;
  } else if (std::strcmp(order, "random") == 0) {
    settings.order = cuda_emulator::Order::random;
  } else {
    return -1;
  }
  return 0;
}

void emulator_set_resident_blocks(int count) { cuda_emulator::settings().resident_blocks = count; }

void emulator_set_multiprocessors(int count) { cuda_emulator::settings().multiprocessors = count; }

}  // extern "C"
