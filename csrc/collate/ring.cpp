#include "collate/ring.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace batchops::collate {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// Free slots that this many leases passed over are memory that nobody needs any more.
constexpr uint64_t kIdleLeases = 4096;
// NaN in every float format, -1 in every signed integer.
constexpr unsigned char kPoison = 0xff;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Four sizes to a doubling, so that batches padded to varying lengths meet in the same slots.
size_t slot_bytes(size_t bytes) {
  if (bytes <= kPage) return kPage;
  size_t doubling = kPage;
  while (doubling * 2 <= bytes) doubling *= 2;
  return round_up(bytes, std::max(doubling / 4, kPage));
}

}  // namespace

std::byte* PageMemory::allocate(size_t bytes) {
#if defined(__linux__)
  // A huge page more than asked for, and trimmed, so that the slot begins on one.
  const size_t align = bytes >= kHugePage ? kHugePage : kPage;
  const size_t mapped = bytes + align - kPage;
  void* const start =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(start);
  const auto address = reinterpret_cast<uintptr_t>(start);
  const size_t head = round_up(address, align) - address;
  if (head > 0) munmap(begin, head);
  const size_t tail = mapped - head - bytes;
  if (tail > 0) munmap(begin + head + bytes, tail);
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) (void)madvise(begin + head, bytes, MADV_HUGEPAGE);
#endif
  return begin + head;
#else
  return static_cast<std::byte*>(std::aligned_alloc(kPage, round_up(bytes, kPage)));
#endif
}

void PageMemory::release(std::byte* data, size_t bytes) noexcept {
#if defined(__linux__)
  munmap(data, bytes);
#else
  (void)bytes;
  std::free(data);
#endif
}

struct Ring::Slot {
  std::byte* data = nullptr;
  size_t bytes = 0;
  State state = State::leased;
  bool poisoned = false;
  uint64_t used = 0;
};

std::byte* Ring::data(const Slot* slot) { return slot->data; }
size_t Ring::size(const Slot* slot) { return slot->bytes; }

Ring::Ring(std::unique_ptr<SlotMemory> memory, size_t capacity, bool checked)
    : memory_(std::move(memory)), capacity_(capacity), checked_(checked) {}

Ring::~Ring() { give_back(std::move(slots_)); }

void Ring::give_back(std::vector<std::unique_ptr<Slot>> slots) {
  for (const auto& slot : slots) memory_->release(slot->data, slot->bytes);
}

Ring::Slot* Ring::reuse(size_t bytes) {
  Slot* best = nullptr;
  for (const auto& slot : slots_) {
    if (slot->state != State::free || slot->bytes < bytes || slot->bytes / 2 > bytes) continue;
    if (best == nullptr || slot->bytes < best->bytes) best = slot.get();
  }
  return best;
}

bool Ring::make_room(size_t wanted, std::vector<std::unique_ptr<Slot>>* evicted) {
  const auto take = [&](auto it) {
    bytes_ -= (*it)->bytes;
    evicted->push_back(std::move(*it));
    slots_.erase(it);
  };
  for (auto it = slots_.begin(); it != slots_.end();) {
    const auto next = it - slots_.begin();
    if ((*it)->state == State::free && clock_ - (*it)->used > kIdleLeases) {
      take(it);
      it = slots_.begin() + next;
    } else {
      ++it;
    }
  }
  while (bytes_ + wanted > capacity_) {
    auto oldest = slots_.end();
    for (auto it = slots_.begin(); it != slots_.end(); ++it) {
      if ((*it)->state != State::free) continue;
      if (oldest == slots_.end() || (*it)->used < (*oldest)->used) oldest = it;
    }
    if (oldest == slots_.end()) return false;
    take(oldest);
  }
  return true;
}

Ring::Slot* Ring::acquire(size_t bytes) {
  const size_t wanted = slot_bytes(bytes);
  std::vector<std::unique_ptr<Slot>> evicted;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    ++clock_;
    if (Slot* const slot = reuse(bytes)) {
      slot->state = State::leased;
      slot->used = clock_;
      ++counted_.reuses;
      lock.unlock();
      if (slot->poisoned) {
        slot->poisoned = false;
        for (size_t i = 0; i < slot->bytes; ++i) {
          if (slot->data[i] == std::byte{kPoison}) continue;
          lock.lock();
          slot->state = State::free;
          throw std::runtime_error("ring: a slot of " + std::to_string(slot->bytes) +
                                   " bytes was written to at byte " + std::to_string(i) +
                                   " after it was released: expected 255, got " +
                                   std::to_string(static_cast<int>(slot->data[i])));
        }
      }
      return slot;
    }
    const bool fits = make_room(wanted, &evicted);
    // Counted before it exists, so that two threads do not pass the capacity together.
    if (fits) bytes_ += wanted;
    if (!fits) ++counted_.refusals;
    if (!fits && evicted.empty()) return nullptr;
    lock.unlock();
    give_back(std::move(evicted));
    if (!fits) return nullptr;
  }
  std::byte* data = nullptr;
  try {
    data = memory_->allocate(wanted);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= wanted;
    throw;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (data == nullptr) {
    bytes_ -= wanted;
    ++counted_.refusals;
    return nullptr;
  }
  auto slot = std::make_unique<Slot>();
  slot->data = data;
  slot->bytes = wanted;
  slot->used = clock_;
  ++counted_.allocations;
  slots_.push_back(std::move(slot));
  return slots_.back().get();
}

void Ring::set_free(Slot* slot) {
  if (checked_) {
    std::memset(slot->data, kPoison, slot->bytes);
    slot->poisoned = true;
  }
  slot->state = State::free;
  slot->used = clock_;
}

void Ring::release(Slot* slot, bool in_flight) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (in_flight) {
    slot->state = State::in_flight;
  } else {
    set_free(slot);
  }
}

void Ring::landed(Slot* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  set_free(slot);
}

void Ring::trim() {
  std::vector<std::unique_ptr<Slot>> evicted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::unique_ptr<Slot>> kept;
    for (auto& slot : slots_) {
      if (slot->state == State::free) {
        bytes_ -= slot->bytes;
        evicted.push_back(std::move(slot));
      } else {
        kept.push_back(std::move(slot));
      }
    }
    slots_ = std::move(kept);
  }
  give_back(std::move(evicted));
}

RingStats Ring::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  RingStats stats = counted_;
  stats.slots = static_cast<int64_t>(slots_.size());
  stats.bytes = static_cast<int64_t>(bytes_);
  for (const auto& slot : slots_) {
    stats.leased += slot->state == State::leased;
    stats.in_flight += slot->state == State::in_flight;
    if (slot->state != State::free) stats.leased_bytes += static_cast<int64_t>(slot->bytes);
  }
  return stats;
}

}  // namespace batchops::collate
