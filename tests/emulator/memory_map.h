// The memory that is watched: registered buffers (global memory) and the shared memory of the
// blocks in flight. Everything else (stacks, the host's data) belongs to nobody and is not counted.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cuda_emulator {

struct Region {
  static constexpr uint64_t kGlobal = ~uint64_t{0};

  unsigned index = 0;  // of all regions there have been
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  size_t guard = 0;          // bytes on either side in which an access is one past the bounds
  uint64_t block = kGlobal;  // whose shared memory
  // How often each byte was read and written; up to 65535. Global memory only.
  std::vector<uint16_t> reads, writes;

  bool global() const { return block == kGlobal; }
};

class MemoryMap {
 public:
  Region& add(const std::string& name, const void* data, size_t bytes, size_t guard,
              uint64_t block = Region::kGlobal);
  void remove_block(uint64_t block);  // its shared memory
  void remove_shared();
  // The region that `address` lies in, or in whose guard; null if there is none.
  Region* find(uintptr_t address) {
    const Region* last = last_;
    if (last != nullptr && address - last->begin < last->bytes) return last_;
    if (nobodys_[slot(address)] == address / kPage) return nullptr;  // of a stack, most often
    return search(address);
  }
  const std::vector<std::unique_ptr<Region>>& global() const { return global_; }

 private:
  static constexpr uintptr_t kPage = 4096;
  static size_t slot(uintptr_t address) { return address / kPage % 1024; }

  Region* search(uintptr_t address);
  template <class F>
  void remove_if(F&& gone);  // of the shared ones

  std::vector<std::unique_ptr<Region>> global_;
  std::vector<std::unique_ptr<Region>> shared_;
  std::vector<Region*> sorted_;  // by begin
  Region* last_ = nullptr;
  std::array<uintptr_t, 1024> nobodys_{};  // pages that no region reaches into
  unsigned count_ = 0;
};

}  // namespace cuda_emulator
