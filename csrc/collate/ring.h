// Slots of memory that batches are written to, used again and again.
//
//   free ── acquire ──> leased ── release ──> free
//                          └── release(in flight) ──> in flight ── landed ──> free
//
// A fresh batch of 40 MB costs more in page faults than the copy that fills it, and page-locking
// it costs more still: so slots are kept, up to a capacity, and a slot is handed out again only
// when nobody can see it any more. Checked rings fill released slots with a pattern and look at it
// when they hand them out: who wrote to a slot that was no longer theirs is found out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace batchops::collate {

// Where slots come from. Called without a lock held, never by pool threads.
class SlotMemory {
 public:
  virtual ~SlotMemory() = default;
  // `bytes` bytes that begin on a page, or nullptr where there is no more.
  virtual std::byte* allocate(size_t bytes) = 0;
  virtual void release(std::byte* data, size_t bytes) noexcept = 0;
};

// Pageable memory, on huge pages where the system has them.
class PageMemory final : public SlotMemory {
 public:
  std::byte* allocate(size_t bytes) override;
  void release(std::byte* data, size_t bytes) noexcept override;
};

struct RingStats {
  int64_t slots = 0;
  int64_t leased = 0;
  int64_t in_flight = 0;
  int64_t bytes = 0;         // of all slots
  int64_t leased_bytes = 0;  // of slots that are not free
  int64_t allocations = 0;   // slots ever made
  int64_t reuses = 0;        // leases that needed none
  int64_t refusals = 0;      // leases refused: capacity reached, or no memory
};

class Ring {
 public:
  struct Slot;

  Ring(std::unique_ptr<SlotMemory> memory, size_t capacity, bool checked);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // A slot of at least `bytes` bytes, or nullptr. Throws std::runtime_error where a checked ring
  // finds a released slot written to.
  Slot* acquire(size_t bytes);
  void release(Slot* slot, bool in_flight);
  void landed(Slot* slot);
  // Gives the memory of free slots back.
  void trim();

  RingStats stats() const;
  size_t capacity() const { return capacity_; }
  static std::byte* data(const Slot* slot);
  static size_t size(const Slot* slot);

 private:
  enum class State { free, leased, in_flight };

  Slot* reuse(size_t bytes);
  // Takes out free slots until `wanted` bytes fit under the capacity; false where they cannot.
  bool make_room(size_t wanted, std::vector<std::unique_ptr<Slot>>* evicted);
  void set_free(Slot* slot);
  void give_back(std::vector<std::unique_ptr<Slot>> slots);

  const std::unique_ptr<SlotMemory> memory_;
  const size_t capacity_;
  const bool checked_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Slot>> slots_;
  size_t bytes_ = 0;
  uint64_t clock_ = 0;
  RingStats counted_;
};

}  // namespace batchops::collate
