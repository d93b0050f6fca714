#include "shared_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulator {
namespace {

// Under AddressSanitizer nobody may touch what lies between two variables or before the first.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;
constexpr size_t kBefore = 4096;  // a page
void forbid(void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
void allow(void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr size_t kGap = 0;
constexpr size_t kBefore = 0;
void forbid(void*, size_t) {}
void allow(void*, size_t) {}
#endif

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void SharedLayout::begin(uint64_t grid, size_t dynamic) {
  grid_ = grid;
  dynamic_ = dynamic;
  static_bytes_ = 0;
  end_ = dynamic;
  variables_.clear();
}

size_t SharedLayout::find(SharedKey& key, size_t bytes, size_t alignment) {
  if (key.grid == grid_) return key.variable;
  const size_t total = round_up(static_bytes_, alignment) + bytes;
  const Settings& limits = settings();
  if (total > limits.static_shared_limit || total + dynamic_ > limits.shared_limit) {
    throw Error("too much shared memory: " + std::to_string(total) + " bytes static and " +
                std::to_string(dynamic_) + " dynamic, the limits are " +
                std::to_string(limits.static_shared_limit) + " static and " +
                std::to_string(limits.shared_limit) + " together");
  }
  static_bytes_ = total;
  const size_t offset = round_up(end_ + kGap, alignment < 16 ? 16 : alignment);
  end_ = offset + bytes;
  if (end_ + kGap > SharedMemory::kCapacity) throw Error("too many shared variables");
  variables_.push_back({key.name, offset, bytes});
  key.grid = grid_;
  key.variable = variables_.size() - 1;
  return key.variable;
}

SharedMemory::SharedMemory() {
  void* mapping = mmap(nullptr, kBefore + kCapacity, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<unsigned char*>(mapping) + kBefore;
  forbid(mapping, kBefore);
  std::memset(data_, 0xff, kCapacity);
}

SharedMemory::~SharedMemory() {
  allow(data_ - kBefore, kBefore + kCapacity);
  munmap(data_ - kBefore, kBefore + kCapacity);
}

void SharedMemory::begin(const SharedLayout& layout) {
  set_reachable(true);
  finish(layout);
  allow(data_, kCapacity);
  std::memset(data_, 0xff, dirty_);
  dirty_ = 0;
  forbid(data_ + layout.dynamic(), kCapacity - layout.dynamic());
  for (const SharedLayout::Variable& variable : layout.variables()) admit(variable);
  used_.clear();
}

void SharedMemory::finish(const SharedLayout& layout) {
  if (layout.end() > dirty_) dirty_ = layout.end();
}

void SharedMemory::admit(const SharedLayout::Variable& variable) {
  allow(data_ + variable.offset, variable.bytes);
}

bool SharedMemory::first_use(size_t i) {
  if (i >= used_.size()) used_.resize(i + 1);
  if (used_[i]) return false;
  used_[i] = true;
  return true;
}

void SharedMemory::set_reachable(bool reachable) {
  if (reachable == reachable_) return;
  reachable_ = reachable;
  mprotect(data_, kCapacity, reachable ? PROT_READ | PROT_WRITE : PROT_NONE);
}

}  // namespace cuda_emulator
