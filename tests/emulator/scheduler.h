// Runs a grid of CUDA threads as fibers, some blocks resident at a time, in an order that tests
// choose. A thread runs until it waits (barrier, warp collective) or returns; then the next one.
// Everything that real hardware would answer with a hang, garbage or a launch failure is an Error
// that names the kernel, block, thread and source line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>
#include "fiber.h"
#include "observer.h"

// The built-in variables of device code, set each time a thread gets its turn.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;

namespace cuda_emulator {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;

// The order in which waiting threads and blocks get their turn.
enum class Order { forward, reverse, random };

// What tests set; the limits are Hopper's.
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;
  int resident_blocks = 1;  // how many blocks are in flight together
  int multiprocessors = 2;  // what cudaDevAttrMultiProcessorCount answers
  size_t static_shared_limit = 48 * 1024;
  size_t shared_limit = 227 * 1024;
};
Settings& settings();

enum class Wait : uint8_t { nothing, warp, block };
enum class Collective : uint8_t { sync, shuffle, ballot };

class Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  unsigned linear = 0;
  bool done = false;
  Wait wait = Wait::nothing;
  Site site;
  // A warp collective: what this lane brings, and what it takes away when all have come.
  Collective collective = Collective::sync;
  unsigned mask = 0;
  int source_lane = 0;
  uint64_t value = 0;

  unsigned lane() const { return linear % 32; }
};

// A launched grid: what its blocks share.
struct Grid {
  std::string kernel;
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared = 0;
  const void* stream = nullptr;
  std::function<void()> body;
};

class Block {
 public:
  void start(const Grid& grid, uint3 index);
  // Runs every warp as far as its waits allow, or not quite, and lets waiting threads go whose
  // partners have all come. False when nothing could move.
  bool step();
  bool done() const { return live_ == 0; }

  const Grid& grid() const { return *grid_; }
  uint3 index() const { return index_; }
  uint64_t linear() const;  // the index as one number, x fastest
  unsigned char* dynamic_shared() { return dynamic_shared_.get(); }
  // The block's instance of the static shared variable that `key` stands for; filled with 0xff
  // (NaN for floats) at first, so that a read before a write shows.
  void* static_shared(const void* key, size_t bytes, const char* name);

  [[noreturn]] void fail(const Thread& thread, const std::string& what, const Site& site) const;
  [[noreturn]] void fail_deadlock() const;

 private:
  static void run_thread(void* thread);
  // Both for the warp whose threads are first ... first + lanes - 1.
  bool run_ready(unsigned first, unsigned lanes);
  bool release_warp(unsigned first, unsigned lanes);
  // Gives the lanes of a warp that have met (a mask) what their collective brings them.
  void exchange(unsigned first, unsigned lanes);
  bool release_barrier();

  struct StaticShared {
    const void* key;
    std::unique_ptr<unsigned char[]> bytes;
  };

  const Grid* grid_ = nullptr;
  uint3 index_{};
  unsigned threads_ = 0;
  unsigned live_ = 0;
  std::vector<std::unique_ptr<Thread>> pool_;
  std::unique_ptr<unsigned char[]> dynamic_shared_;
  std::vector<StaticShared> static_shared_;
  size_t static_shared_bytes_ = 0;
  std::exception_ptr failure_;
};

// Runs the whole grid before it returns. Throws Error.
void run(const Grid& grid);

// The thread that is running now. Throws Error outside a kernel.
Thread& current();
// Suspends the running thread until its block, or the lanes of `mask`, have come too.
void wait_for_block(const Site& site);
uint64_t wait_for_warp(Collective collective, unsigned mask, uint64_t value, int source_lane,
                       const Site& site);

void name_next_launch(const char* name);
std::string take_launch_name();

}  // namespace cuda_emulator
