// What happens while a grid runs, for whoever looks: the byte counters (traffic.h) and the race
// detector (race.h). The scheduler and the emulated intrinsics report here; loads and stores of
// kernel code come from the compiler's instrumentation instead (instrument.cpp), and are events
// only where it is PTX that runs (ptx_machine.h).
//
//   if (Observer* o = observer()) o->fence(Scope::device);
//
// With no observer every event costs one branch. With one, all blocks run on one host thread.
// Functions in headers that kernels include and that touch device memory themselves (an atomic's
// plain read and write) are marked EMULATOR_UNSEEN and report what they stand for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <span>
#include <string>

#include "work_order.h"

#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

namespace cuda_emulator {

// Which threads an atomic or a fence counts for.
enum class Scope : uint8_t { block, cluster, device, system };

enum class MemoryOrder : uint8_t { relaxed, acquire, release, acq_rel, seq_cst };

struct GridEvent {
  const std::string& kernel;
  uint64_t blocks;
  unsigned threads;         // of a block
  unsigned cluster_blocks;  // 1 without clusters
  const WorkOrder& order;   // in its stream and among the others
};

// An atomic operation, done at once. Plain CUDA atomics are relaxed and of device scope; *_block
// and *_system ones name their scope. A failed compare-and-swap reads only.
struct AtomicEvent {
  const void* address;
  size_t bytes;
  bool reads, writes;
  MemoryOrder order;
  Scope scope;
  const void* code;  // __builtin_return_address(0) of an intrinsic that is not inlined, or null
};

// An asynchronous copy, which happens at any time between issue and completion.
struct CopyEvent {
  uint64_t id;  // differs from those of all copies under way
  void* to;
  const void* from;
  size_t bytes;
  size_t zeros;  // written after `bytes`, as cp.async does past its source size
  const void* code;
};

// Blocks are numbered in the grid and threads in their block, x fastest. Between thread_runs and
// thread_stops that thread is the running one; an event "of the running thread" belongs to it.
class Observer {
 public:
  virtual ~Observer() = default;

  virtual void grid_starts(const GridEvent&) {}
  virtual void grid_ends() {}  // also after an Error
  virtual void block_starts(uint64_t /*block*/) {}
  virtual void block_ends(uint64_t /*block*/) {}
  // Memory of the block that came to be; gone at block_ends.
  virtual void shared_memory(uint64_t /*block*/, const char* /*name*/, const void* /*data*/,
                             size_t /*bytes*/) {}

  // A fiber's turn begins and ends (by waiting, yielding or returning).
  virtual void thread_runs(uint64_t /*block*/, unsigned /*thread*/) {}
  virtual void thread_stops() {}

  // All of `threads` have come to a barrier of the block and now go on: __syncthreads, bar.sync of
  // a part of the block, block-wide votes.
  virtual void barrier_released(uint64_t /*block*/, std::span<const unsigned> /*threads*/) {}
  // The lanes of a warp that have met. Only __syncwarp orders memory; shuffles, votes and
  // reductions make lanes meet and order nothing.
  virtual void warp_released(uint64_t /*block*/, unsigned /*warp*/, unsigned /*lanes*/,
                             bool /*orders_memory*/) {}
  // All threads of these blocks have met: cluster.sync() and grid.sync().
  virtual void blocks_released(std::span<const uint64_t> /*blocks*/) {}
  // The running thread arrives at an object (mbarrier, bar.arrive, cluster arrive): whoever waits
  // for the object afterwards sees what it did before. `object` is any address that stands for it.
  virtual void arrives(const void* /*object*/) {}
  virtual void waited(const void* /*object*/) {}

  // All of these are of the running thread.
  virtual void accessed(const void* /*data*/, size_t /*bytes*/, bool /*writes*/,
                        const void* /*code*/) {}
  virtual void fence(Scope) {}
  virtual void atomic(const AtomicEvent&) {}
  virtual void copy_issued(const CopyEvent&) {}
  // A wait by the running thread has let this copy complete; or one by any thread on `object`,
  // non-null, to which whoever waits for it owes the sight of the copy.
  virtual void copy_completed(uint64_t /*id*/, const void* /*object*/) {}
  virtual void yields() {}  // a spinning wait gives way

  // cudaMemsetAsync, cudaMemcpyAsync: `from` is null for a memset. In stream order.
  virtual void memory_operation(void* /*to*/, const void* /*from*/, size_t /*bytes*/,
                                const WorkOrder&) {}
  // The host has waited for all that it has issued.
  virtual void host_waited() {}
};

// Null when nobody looks.
extern Observer* the_observer;
inline Observer* observer() { return the_observer; }

}  // namespace cuda_emulator
