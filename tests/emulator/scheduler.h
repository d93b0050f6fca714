// Runs a grid of CUDA threads as fibers, some blocks resident at a time, in an order that tests
// choose. A thread runs until it waits (barrier, warp collective), gives way (atomics, fences,
// __nanosleep) or returns; then the next one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>
#include "async_copy.h"
#include "fiber.h"
#include "observer.h"
#include "settings.h"
#include "shared_memory.h"

// The built-in variables of device code, set each time a thread gets its turn.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_emulator {

enum class Wait : uint8_t { nothing, warp, barrier, cluster, grid };
enum class Collective : uint8_t {
  sync,
  shuffle,
  ballot,
  match_any,
  match_all,
  add,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor
};

class Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  unsigned linear = 0;
  bool done = false;
  Wait wait = Wait::nothing;
  Site site;                   // of the last wait
  const void* code = nullptr;  // or, where that is not known, an instruction of it
  Collective collective = Collective::sync;
  unsigned mask = 0;
  unsigned barrier = 0;
  unsigned votes = 0;              // what a block barrier brought
  const void* arrivals = nullptr;  // what those stand for that came there and did not wait
  // What the last atomic of this thread saw: a spin sees the same again.
  const void* seen_address = nullptr;
  uint64_t seen_value = 0;
  bool cluster_arrived = false, grid_arrived = false;
  uint64_t cluster_token = 0, grid_token = 0;
  AsyncCopies copies;

  unsigned lane() const { return linear % 32; }
  void at(const Site& where) {
    site = where;
    code = nullptr;
  }
  std::string place() const;
};

// Lanes as bits.
struct Warp {
  unsigned exist = 0;
  unsigned done = 0;
  unsigned ready = 0;
  unsigned later = 0;    // ready in the next round
  unsigned meeting = 0;  // wait in a collective
  bool uniform = true;   // and all in the same one, with the same mask
  uint64_t value[32];    // what a lane brings, then what it takes away
  uint8_t source[32];
};

// One of a block's sixteen barriers.
struct Barrier {
  unsigned expected = 0;  // threads
  unsigned arrived = 0;
  unsigned votes = 0;
  unsigned first = 0;  // the thread that came first
  bool aligned = true;
  bool split = false;  // some do not wait
};

// A barrier in two halves, of a cluster or a grid.
struct SplitBarrier {
  uint64_t all = 0;
  uint64_t expected = 0;  // those that have not exited
  uint64_t arrived = 0;
  uint64_t generation = 0;
  bool whole = true;  // everybody came by sync()

  void begin(uint64_t threads) {
    all = expected = threads;
    arrived = generation = 0;
  }
  // Stands for one generation where the observer wants an object.
  const void* object(uint64_t of) const { return &objects_[of % 2]; }

 private:
  char objects_[2] = {};
};

// A launched grid: what its blocks share.
struct Grid {
  std::string kernel;
  const void* function = nullptr;
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared = 0;
  dim3 cluster{1, 1, 1};
  bool cooperative = false;
  std::function<void()> body;

  unsigned block_threads() const { return threads.x * threads.y * threads.z; }
  uint64_t block_count() const { return uint64_t{blocks.x} * blocks.y * blocks.z; }
  unsigned cluster_blocks() const { return cluster.x * cluster.y * cluster.z; }
};

// Blocks that run together and reach each other's shared memory; a single one without clusters.
struct Cluster {
  uint3 index{};
  std::vector<Block*> blocks;  // by rank
  SplitBarrier barrier;
  bool done() const;
};

class Block {
 public:
  void start(const Grid& grid, Cluster* cluster, unsigned rank, uint3 index);
  // Runs every warp as far as its waits allow, or not quite, and lets waiting threads go whose
  // partners have all come. False when nothing could move.
  bool step();
  bool done() const { return live_ == 0; }
  bool begun() const { return begun_; }

  const Grid& grid() const { return *grid_; }
  uint3 index() const { return index_; }
  uint64_t linear() const;  // the index as one number, x fastest
  unsigned rank() const { return rank_; }
  Cluster& cluster() const { return *cluster_; }
  SharedMemory& shared() { return shared_; }
  unsigned char* dynamic_shared() { return shared_.data(); }
  // The block's instance of a static shared variable.
  void* static_shared(SharedKey& key, size_t bytes, size_t alignment,
                      const Site& site = Site::current());

  // The running thread's part in what its block does.
  void arrive_at_barrier(Thread& thread, unsigned id, unsigned count, bool waits, bool aligned,
                         bool vote, const Site& site);
  void meet(Thread& thread);
  void give_way(Thread& thread);
  void check_grid_site(const Thread& thread, const Site& site);
  // Threads that wait in `wait` go on in the next round.
  void wake(Wait wait);

  [[noreturn]] void fail(const Thread& thread, const std::string& what, const Site& site) const;
  Error error(const Thread& thread, const std::string& what, const std::string& place) const;
  [[noreturn]] void fail_deadlock() const;
  // A thread that spins, or null.
  const Thread* spinning() const;

 private:
  friend Fiber& next_fiber();
  static Fiber& run_thread(void* thread);
  void run_turn(Warp& warp, unsigned first);
  void release_warp(Warp& warp, unsigned first);
  void check_meeting(Warp& warp, unsigned first);
  void exchange(Warp& warp, unsigned first, unsigned lanes);
  bool release_barriers();
  void ended(Thread& thread);

  const Grid* grid_ = nullptr;
  Cluster* cluster_ = nullptr;
  unsigned rank_ = 0;
  uint3 index_{};
  unsigned threads_ = 0;
  unsigned live_ = 0;
  bool begun_ = false;
  std::unique_ptr<Thread[]> pool_;
  unsigned pool_size_ = 0;
  Warp warps_[32];
  Barrier barriers_[16];
  char arrivals_[16] = {};          // at each of them: an address for the observer
  unsigned barriers_complete_ = 0;  // bits
  Site grid_site_;
  uint64_t grid_site_generation_ = ~uint64_t{0};
  SharedMemory shared_;
  std::exception_ptr failure_;
};

// Runs the whole grid, whose sizes launch() has checked, before it returns. Throws Error.
void run(const Grid& grid);

// The thread that is running now. Throws Error outside a kernel.
Thread& current();
bool in_kernel();
// Of its warp, those that have not exited.
unsigned live_lanes();

// Each suspends the running thread until its partners have come too.

// `count` threads at barrier `id` of the block, 0 for all of them; returns how many voted yes.
// `aligned`: at the same place in the source.
unsigned wait_for_barrier(unsigned id, unsigned count, bool aligned, bool vote, const Site& site);
void arrive_at_barrier(unsigned id, unsigned count, const Site& site);
// The lanes of `mask`.
uint64_t wait_for_warp(Collective collective, unsigned mask, uint64_t value, int source_lane,
                       const Site& site);
void cluster_arrive(bool relaxed, const Site& site);
void cluster_wait(const Site& site);
void cluster_sync(const Site& site);
uint64_t grid_arrive(const Site& site);
void grid_wait(uint64_t token, const Site& site);
void grid_sync(const Site& site);

// Lets others run first. Whoever waits by looking again and again does it through here.
void give_way(const Site& site);
// The same from a signal handler, for a thread that never gives way.
void give_way_by_force(const void* code);
// What an atomic of the running thread found at `address`, and whether it left something else.
void saw(const void* address, uint64_t value, bool changed);
// The running thread's instruction at `code` has touched memory at `address` that is not there.
// For a signal handler: does not return to it.
[[noreturn]] void fail_from_signal(const void* address, const void* code);
// "kernel: block (0, 0, 0) thread (1, 0, 0)" and a new line, of the running thread, without memory
// of its own; returns its length.
int describe_running(char* text, size_t size);
// Turns that threads have had, in all.
uint64_t turns();

// The address in block `rank` of this cluster that corresponds to `address` in this block's shared
// memory.
void* map_shared(const void* address, unsigned rank, const Site& site);
// The rank of the block of this cluster that `address` is shared memory of.
unsigned shared_rank(const void* address, const Site& site);

}  // namespace cuda_emulator
