#include "memory_map.h"

#include <algorithm>

namespace cuda_emulator {

Region& MemoryMap::add(const std::string& name, const void* data, size_t bytes, size_t guard,
                       uint64_t block) {
  nobodys_.fill(0);
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
  const uintptr_t page = address / kPage * kPage;
  bool page_is_free = true;
  auto after = std::upper_bound(sorted_.begin(), sorted_.end(), address,
                                [](uintptr_t a, Region* r) { return a < r->begin; });
  if (after != sorted_.begin()) {
    Region* before = *(after - 1);
    const uintptr_t end = before->begin + before->bytes + before->guard;
    if (address < end) return last_ = before;
    page_is_free = end <= page;
  }
  if (after != sorted_.end()) {
    const uintptr_t begin = (*after)->begin - (*after)->guard;
    if (begin <= address) return *after;
    page_is_free = page_is_free && begin >= page + kPage;
  }
  if (page_is_free) nobodys_[slot(address)] = address / kPage;
  return nullptr;
}

}  // namespace cuda_emulator
