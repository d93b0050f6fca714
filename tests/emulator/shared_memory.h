// The shared memory of one block: dynamic part first, then the static variables in the order in
// which the grid's threads first come to them, so that every block of a grid has the same layout
// (map_shared_rank counts on it). All of it is 0xff (NaN for floats) at first, so that a read
// before a write shows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "settings.h"

namespace cuda_emulator {

// One for each shared variable in the source: where it lies in the grid that used it last.
struct SharedKey {
  const char* name;
  uint64_t grid = 0;
  size_t variable = 0;
};

// Shared by the blocks of a grid.
class SharedLayout {
 public:
  void begin(uint64_t grid, size_t dynamic);
  // The index of the variable. Throws Error when the block would have too much shared memory.
  size_t find(SharedKey& key, size_t bytes, size_t alignment);

  struct Variable {
    const char* name;
    size_t offset;
    size_t bytes;
  };
  const std::vector<Variable>& variables() const { return variables_; }
  size_t dynamic() const { return dynamic_; }
  size_t static_bytes() const { return static_bytes_; }
  // How far into a block's memory anything lies.
  size_t end() const { return end_; }

 private:
  uint64_t grid_ = 0;
  size_t dynamic_ = 0;
  size_t static_bytes_ = 0;
  size_t end_ = 0;
  std::vector<Variable> variables_;
};

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // For a new block of the grid.
  void begin(const SharedLayout& layout);
  // The grid's run is over: whatever its layout names may have been written.
  void finish(const SharedLayout& layout);
  unsigned char* data() const { return data_; }
  // A variable has been added to the layout.
  void admit(const SharedLayout::Variable& variable);
  // True once for each variable.
  bool first_use(size_t i);
  bool holds(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= data_ && byte < data_ + kCapacity;
  }
  // Other blocks of a cluster can get at a block's memory only while it runs.
  void set_reachable(bool reachable);

  static constexpr size_t kCapacity = 320 * 1024;

 private:
  unsigned char* data_ = nullptr;
  size_t dirty_ = 0;  // from here on all is 0xff
  bool reachable_ = true;
  std::vector<bool> used_;
};

}  // namespace cuda_emulator
