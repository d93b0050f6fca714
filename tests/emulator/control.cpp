// What Python calls to steer the emulator (emulator.py).
#include "control.h"

#include <cstring>
#include <fstream>

#include "kernel.h"
#include "ptx_machine.h"

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
  cuda_emulator::restart_schedule();
  return 0;
}

void emulator_set_resident_blocks(int count) { cuda_emulator::settings().resident_blocks = count; }

void emulator_set_multiprocessors(int count) { cuda_emulator::settings().multiprocessors = count; }

// Another device: the shared memory that a block may have, and its compute capability.
void emulator_set_device(size_t shared_limit, int compute_major) {
  cuda_emulator::settings().shared_limit = shared_limit;
  cuda_emulator::settings().compute_major = compute_major;
}

// The architecture that its code was compiled for, as 80; 0: its own.
void emulator_set_code_version(int version) { cuda_emulator::settings().code_version = version; }

// Multiprocessors that have been set apart, of which the occupancy calls know nothing: blocks that
// run together in a cooperative launch; 0: as many as the device holds.
void emulator_set_blocks_held(int count) { cuda_emulator::settings().blocks_held = count; }

// What the occupancy calls answer; 0: what the kernel's threads, registers and shared memory allow.
void emulator_set_blocks_per_multiprocessor(int count) {
  cuda_emulator::settings().blocks_per_multiprocessor = count;
}

// Of a thread of the kernel that is launched by this name; 0: what its launch bounds leave.
void emulator_set_registers(const char* kernel, int registers) {
  cuda_emulator::set_registers(kernel, registers);
}

// Whether kernels of which that has not been told may not be launched.
void emulator_require_registers(bool required) {
  cuda_emulator::settings().registers_required = required;
}

// Kernels run as PTX from here on, those of this file and of others that were loaded before.
int emulator_load_ptx(const char* file, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    cuda_emulator::ptx::load(file);
    return nullptr;
  });
}

void emulator_forget_ptx() { cuda_emulator::ptx::forget(); }

// "tanh.approx.f32\n…"
void emulator_unknown_ptx(char* text, size_t size) {
  std::string all;
  for (const std::string& name : cuda_emulator::ptx::unknown_instructions()) all += name + "\n";
  std::snprintf(text, size, "%s", all.c_str());
}

// Writes "count name line file\n…": how often each instruction has run since it was last asked for.
int emulator_take_ptx_counts(const char* to, char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    std::ofstream out(to);
    for (const auto& [name, file, line, runs] : cuda_emulator::ptx::take_counts()) {
      out << runs << ' ' << name << ' ' << line << ' ' << file << '\n';
    }
    return out.flush() ? nullptr : "cannot write the counts";
  });
}

}  // extern "C"
