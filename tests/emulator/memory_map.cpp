#include "memory_map.h"

#include <algorithm>

namespace cuda_emulator {

Region& MemoryMap::add(const std::string& name, const void* data, size_t bytes, size_t guard,
                       uint64_t block) {
  auto region = std::make_unique<Region>();
  region->index = count_++;
  region->name = name;
  region->begin = reinterpret_cast<uintptr_t>(data);
  region->bytes = bytes;
  region->guard = guard;
  region->block = block;
  if (region->global()) {
    region->reads.resize(bytes);
    region->writes.resize(bytes);
  }
  Region& added = *region;
  const auto place = std::upper_bound(sorted_.begin(), sorted_.end(), added.begin,
                                      [](uintptr_t begin, Region* r) { return begin < r->begin; });
  sorted_.insert(place, &added);
  (added.global() ? global_ : shared_).push_back(std::move(region));
  return added;
}

void MemoryMap::remove_block(uint64_t block) {
  remove_if([&](const Region& region) { return region.block == block; });
}

void MemoryMap::remove_shared() {
  remove_if([](const Region& region) { return !region.global(); });
}

template <class F>
void MemoryMap::remove_if(F&& gone) {
  last_ = nullptr;
  std::erase_if(sorted_, [&](Region* region) { return gone(*region); });
  std::erase_if(shared_, [&](const std::unique_ptr<Region>& region) { return gone(*region); });
}

Region* MemoryMap::search(uintptr_t address) {
  auto after = std::upper_bound(sorted_.begin(), sorted_.end(), address,
                                [](uintptr_t a, Region* r) { return a < r->begin; });
  if (after != sorted_.begin()) {
    Region* before = *(after - 1);
    if (address - before->begin < before->bytes + before->guard) return last_ = before;
  }
  if (after != sorted_.end() && (*after)->begin - address <= (*after)->guard) return *after;
  return nullptr;
}

}  // namespace cuda_emulator
