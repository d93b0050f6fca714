// Finds data races of kernels in shared and global memory: two accesses of the same byte by
// different threads, one of them a write, that nothing orders, whatever order this run happened to
// take. What orders, after the PTX memory model:
//
//   __syncthreads and other barriers, cluster.sync, grid.sync     all before with all after
//   __syncwarp                                                    its lanes (shuffles do not)
//   a release followed by an acquire of what it wrote             release: an atomic with that
//   order, or a fence and then a relaxed atomic; acquire: such an atomic, or a relaxed one and then
//   a fence. Both scopes must reach the other thread. Fences may stand on the far side of a barrier
//   from their atomic.
//   arrival at an object and a wait for it; completion of an asynchronous copy; the end of a grid
//
// Atomics do not race with each other where their scopes reach; plain accesses race with them, but
// what comes after an atomic update of a byte also comes after the atomics whose work it found
// there. Volatile accesses are relaxed atomics. Every read and write of a byte is remembered for as
// long as something may race with it (shadow.h), across grids too: those of two streams are ordered
// by what the host asked for (work_order.h), and by nothing that their kernels do.
#pragma once
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "access.h"
#include "knowledge.h"
#include "shadow.h"
#include "work_order.h"

namespace cuda_emulator {

struct RaceReport {
  struct Side {
    Place place;
    const void* code;
    const char* what;  // "read", "atomic write", …
    bool copy;         // by an asynchronous copy of that thread
  };
  std::string kernel;
  std::string buffer;
  uint64_t offset;  // of the first byte
  Side earlier, later;
  std::string why;  // more than "nothing orders them", or empty
};

class RaceDetector {
 public:
  void begin(const GridEvent& grid);
  void end();
  // A copy or a memset of the host: work without threads, of one access to each buffer.
  void begin_operation(const char* name, const WorkOrder& order);
  // Whatever is issued from here on comes after all that has been.
  void all_synchronized() { past_.clear(); }

  void access(const Access& access);
  // What an atomic makes known, beside being an access.
  void atomic(Place place, const AtomicEvent& event);
  void fence(Place place, Scope scope);
  void barrier(uint64_t block, std::span<const unsigned> threads);
  void warp_sync(uint64_t block, unsigned warp, unsigned lanes);
  void blocks_sync(std::span<const uint64_t> blocks);
  void arrives(Place place, const void* object);
  void waited(Place place, const void* object);
  // An asynchronous copy's accesses are its agent's, one agent a thread.
  void copy_access(Access access, uint64_t id);
  void copy_completed(Place place, uint64_t id, const void* object);

  const std::vector<RaceReport>& reports() const { return reports_; }

 private:
  static constexpr uint32_t kNobody = Mark::kNobody;
  static constexpr unsigned kReach = 3;  // block, cluster, device (and system, which is no farther)
  static constexpr size_t kMostReports = 20;

  // How far apart two threads are, or how far a scope reaches.
  enum Reach : unsigned { same_block, same_cluster, same_device };

  // What a thread knows; what its last fences made fit to be published, by their reach; what it
  // has read off relaxed atomics and may count on after a fence, by how far it came.
  struct Sight {
    Known known;
    Known published[kReach];
    Known pending[kReach];

    void add(const Sight& other);
    bool same_as(const Sight& other) const;
  };
  struct Actor {
    Stamp stamp = 0;
    Sight sight;
  };

  // A region, and what is known of its bytes.
  struct Touched {
    const Region* region;
    Shadow shadow;
  };
  // A grid, or an operation of the host.
  struct Work {
    std::string name;
    unsigned threads = 0;  // of a block
    uint32_t actors = 0;   // threads of the grid
    WorkOrder order;
    std::unordered_map<unsigned, Touched> touched;  // by the region's index

    bool is_agent(uint32_t actor) const { return actor >= actors; }
    Place place_of(uint32_t actor) const {
      return {actor % actors / threads, actor % actors % threads};
    }
  };

  // What was released at an address, by the block and the reach of who released it.
  struct Released {
    uint32_t block;
    Reach reach;
    Known known;
  };

  uint32_t actor_of(Place place) const {
    return static_cast<uint32_t>(place.block) * work_.threads + place.thread;
  }
  uint32_t block_of(uint32_t actor) const {
    return static_cast<uint32_t>(work_.place_of(actor).block);
  }
  Done done_by(Place place) const;
  Reach distance(uint32_t block, uint32_t other) const;
  static Reach reach_of(Scope scope);
  void meet(const std::vector<uint32_t>& actors);
  void release(const void* address, uint32_t block, Reach reach, const Known& known);
  bool covers(uint32_t actor, const Mark& mark);
  void mark(const Access& access, uint32_t actor, Stamp stamp, uint32_t knower);
  // Whether an actor who knows what `knower` does, or is it, comes after `before`.
  bool ordered(const Mark& before, uint32_t actor, uint32_t knower);
  bool reach_each_other(const Mark& a, const Mark& b) const;
  // Whether `now` is ordered after a later update than the i-th write.
  bool observed(std::span<const Mark> writes, size_t i, const Mark& now, uint32_t knower);
  // Whether the two may not both be: `now` by an actor who knows what `knower` does.
  bool conflict(const Mark& before, const Mark& now, uint32_t knower);
  void report(const Mark& before, bool before_writes, const Access& access, const Mark& now,
              size_t offset);
  // Nothing orders these two.
  void compare(const Work& before, const Work& now);
  void compare(const Work& before, const Shadow& then, const Work& now, const Touched& here);
  RaceReport::Side side(const Work& work, const Mark& mark, bool reads, bool writes) const;

  Work work_;               // that runs
  std::vector<Work> past_;  // with which work to come may be concurrent
  unsigned cluster_blocks_ = 1;
  std::vector<Actor> actors_;
  std::vector<uint32_t> barriers_;  // of each block
  std::unordered_map<const void*, std::vector<Released>> released_;
  struct Object {
    Sight sight;
    std::vector<Done> arrived;  // and not yet in `sight`
  };
  std::unordered_map<const void*, Object> objects_;
  struct Copy {
    uint32_t agent;
    Stamp stamp;
  };
  std::unordered_map<uint64_t, Copy> copies_;
  std::vector<Stamp> agent_stamps_;
  std::vector<const void*> codes_;  // by site
  std::set<std::pair<unsigned, std::pair<unsigned, std::string>>> seen_;
  std::vector<RaceReport> reports_;
  // covers() is asked for the same thing over and over.
  struct {
    uint32_t knower = kNobody, actor = kNobody;
    Stamp stamp = 0;
    bool covers = false;
  } asked_;
};

}  // namespace cuda_emulator
