// Vectors on huge pages: a plan of ten million samples costs less than the page faults of its
// memory.
#pragma once
#include <cstddef>
#include <new>
#include <utility>
#include <vector>

#include "collate/ring.h"

namespace batchops::collate {

template <class T>
struct HugePages {
  using value_type = T;
  HugePages() = default;
  template <class U>
  explicit HugePages(const HugePages<U>&) {}

  static constexpr size_t kLarge = size_t{2} << 20;

  T* allocate(size_t n) {
    const size_t bytes = n * sizeof(T);
    void* const data = bytes < kLarge ? ::operator new(bytes) : PageMemory().allocate(whole(bytes));
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<T*>(data);
  }
  void deallocate(T* data, size_t n) noexcept {
    const size_t bytes = n * sizeof(T);
    if (bytes < kLarge) {
      ::operator delete(data);
    } else {
      PageMemory().release(reinterpret_cast<std::byte*>(data), whole(bytes));
    }
  }
  // Without a value a number is left as it is: who makes a vector of ten million writes them all,
  // and zeros would be a pass more.
  template <class U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;
  }
  template <class U, class... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
  bool operator==(const HugePages&) const = default;

 private:
  static size_t whole(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
};

template <class T>
using Large = std::vector<T, HugePages<T>>;

}  // namespace batchops::collate
