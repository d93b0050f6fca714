// Brings together what the instrumented loads and stores (instrument.cpp) and the scheduler's
// events say, and hands it to the byte counters and the race detector. One at a time, set as the
// observer while it lives.
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "access.h"
#include "memory_map.h"
#include "observer.h"
#include "race.h"
#include "traffic.h"

namespace cuda_emulator {

class Recorder final : public Observer {
 public:
  Recorder(bool traffic, bool races);
  ~Recorder() override;

  MemoryMap& memory() { return memory_; }
  // What was seen, as JSON; code addresses as offsets into this library.
  std::string report() const;

  // Of the running thread; nothing happens outside of kernels.
  void touch(const void* data, size_t bytes, bool reads, bool writes, const void* code);
  void touch_atomic(const AtomicEvent& event);

  void grid_starts(const GridEvent& grid) override;
  void grid_ends() override;
  void block_ends(uint64_t block) override;
  void shared_memory(uint64_t block, const char* name, const void* data, size_t bytes) override;
  void thread_runs(uint64_t block, unsigned thread) override;
  void thread_stops() override { running_ = false; }
  void barrier_released(uint64_t block, std::span<const unsigned> threads) override;
  void warp_released(uint64_t block, unsigned warp, unsigned lanes, bool orders_memory) override;
  void blocks_released(std::span<const uint64_t> blocks) override;
  void arrives(const void* object) override;
  void waited(const void* object) override;
  void accessed(const void* data, size_t bytes, bool writes, const void* code) override {
    touch(data, bytes, !writes, writes, code);
  }
  void fence(Scope scope) override;
  void atomic(const AtomicEvent& event) override { touch_atomic(event); }
  void copy_issued(const CopyEvent& copy) override;
  void copy_completed(uint64_t id, const void* object) override;
  void memory_operation(void* to, const void* from, size_t bytes, const WorkOrder& order) override;
  void host_waited() override { races_.all_synchronized(); }

 private:
  struct Outside {  // an access past a buffer's bounds
    std::string kernel, buffer;
    int64_t offset;
    size_t bytes;
    bool write;
    Place place;
    const void* code;
  };
  static constexpr size_t kMostOutside = 20;

  // Calls take(access) for the part of the access that lies in a region, if any does.
  template <class F>
  void with_access(const void* data, size_t bytes, bool reads, bool writes, const void* code,
                   F&& take);
  unsigned site(const void* code);

  const bool count_traffic_, find_races_;
  MemoryMap memory_;
  Traffic traffic_;
  RaceDetector races_;
  std::vector<Outside> outside_;
  std::unordered_map<const void*, unsigned> sites_;
  const void* last_code_ = nullptr;
  unsigned last_site_ = 0;
  std::string kernel_;
  unsigned threads_ = 0;
  bool running_ = false;
  Place place_;
};

// Null when nothing is recorded.
extern Recorder* the_recorder;

}  // namespace cuda_emulator
