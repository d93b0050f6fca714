// Which accesses of other threads a thread is sure to come after: a vector clock, kept small by
// what CUDA is like. Threads are numbered over the whole grid.
//
// A thread's stamp grows with everything that others may learn of it. Its high half counts the
// barriers of its whole block, so that one number, the block's floor, stands for "all that the
// block's threads did before that barrier". Threads known beyond the floor are listed one by one.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace cuda_emulator {

using Stamp = uint64_t;

constexpr Stamp stamp_at_barrier(uint32_t barriers) { return Stamp{barriers} << 32; }

class Knowledge;
using Known = std::shared_ptr<const Knowledge>;  // null: nothing

// All that a thread did up to a stamp.
struct Done {
  uint32_t block, thread;
  Stamp stamp;
};

class Knowledge {
 public:
  // Whether what `thread` of `block` did at `stamp` is known.
  bool covers(uint32_t block, uint32_t thread, Stamp stamp) const;

  // What both know. Either may be null.
  static Known both(const Known& a, const Known& b);
  // And `done`, in any order.
  static Known with(const Known& known, std::vector<Done> done);
  // And all that `block` did before its barrier number `barriers`.
  static Known with_floor(const Known& known, uint32_t block, uint32_t barriers);

 private:
  struct Floor {
    uint32_t block;
    uint32_t barriers;
  };
  uint32_t floor(uint32_t block) const;

  std::vector<Floor> floors_;  // sorted by block
  std::vector<Done> exact_;    // sorted by thread; above its block's floor
};

}  // namespace cuda_emulator
