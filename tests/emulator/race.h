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
// Atomics do not race with each other where their scopes reach; plain accesses race with them.
// Volatile accesses are relaxed atomics. Of several unordered reads of a byte two are remembered.
#pragma once
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "access.h"
#include "knowledge.h"

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
  void region_ends(const Region& region) { shadows_.erase(region.index); }

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
  static constexpr uint32_t kNobody = ~0u;
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

  struct Mark {  // an access that a byte remembers
    uint32_t actor = kNobody;
    uint16_t site = 0;
    Kind kind = Kind::plain;
    Scope scope = Scope::device;
    Stamp stamp = 0;

    bool operator==(const Mark&) const = default;
  };
  struct Cell {
    Mark write;
    Mark reads[2];

    bool operator==(const Cell&) const = default;
  };

  // What was released at an address, by the block and the reach of who released it.
  struct Released {
    uint32_t block;
    Reach reach;
    Known known;
  };

  uint32_t actor_of(Place place) const {
    return static_cast<uint32_t>(place.block) * threads_ + place.thread;
  }
  bool is_agent(uint32_t actor) const { return actor >= actors_.size(); }
  uint32_t block_of(uint32_t actor) const {
    return actor % static_cast<uint32_t>(actors_.size()) / threads_;
  }
  Place place_of(uint32_t actor) const;
  Done done_by(Place place) const;
  Reach distance(uint32_t block, uint32_t other) const;
  static Reach reach_of(Scope scope);
  void meet(const std::vector<uint32_t>& actors);
  void release(const void* address, uint32_t block, Reach reach, const Known& known);
  bool covers(uint32_t actor, const Mark& mark);
  void mark(const Access& access, uint32_t actor, Stamp stamp, uint32_t knower);
  // Whether the two may not both be: `now` by an actor who knows what `knower` does.
  bool conflict(const Mark& before, const Mark& now, uint32_t knower);
  void report(const Mark& before, bool before_writes, const Access& access, const Mark& now,
              size_t offset);
  RaceReport::Side side(const Mark& mark, bool reads, bool writes) const;

  std::string kernel_;
  unsigned threads_ = 0;
  unsigned cluster_blocks_ = 1;
  std::vector<Actor> actors_;
  std::vector<uint32_t> barriers_;  // of each block
  std::unordered_map<unsigned, std::vector<Cell>> shadows_;
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
