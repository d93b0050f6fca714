// What the race detector remembers of a region: for each byte every access that a later one might
// race with. Mostly that is one write and one read; the accesses of bytes that many threads read,
// or update by atomics, with nothing between them that orders them, are a list.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "access.h"
#include "knowledge.h"

namespace cuda_emulator {

// An access that a byte remembers.
struct Mark {
  static constexpr uint32_t kNobody = ~0u;

  uint32_t actor = kNobody;
  uint16_t site = 0;
  Kind kind : 4 = Kind::plain;
  bool update : 4 = false;  // an atomic that reads and writes at once
  Scope scope = Scope::device;
  Stamp stamp = 0;

  bool operator==(const Mark&) const = default;
  // Whoever races with `other`, of the same block and no later, also races with this: it reaches no
  // farther. (A read stands for no write; the caller knows which is which.)
  bool outlasts(const Mark& other) const {
    return kind == Kind::plain || (other.kind == Kind::atomic && scope <= other.scope);
  }
};

class Shadow {
 public:
  explicit Shadow(size_t bytes) : cells_(bytes) {}

  size_t bytes() const { return cells_.size(); }

  // `now` joins what these bytes remember. judge.meets(before, before_writes, offset) is called
  // with the writes, or reads, with which it may conflict; judge.replaces(before) tells whether
  // `before`, of the same sort, comes before `now` and may be forgotten for it.
  template <class Judge>
  void access(size_t offset, size_t bytes, const Mark& now, bool writes, Judge& judge);

  // The end of the bytes from `offset` on that remember the same as the one there.
  size_t end_of_run(size_t offset) const;
  std::span<const Mark> writes(size_t offset) const;  // in the order of this run
  std::span<const Mark> reads(size_t offset) const;

 private:
  struct Cell {
    Mark write, read;
    uint32_t list = 0;  // where not 0: all marks are in that list

    bool operator==(const Cell&) const = default;
  };
  struct List {
    std::vector<Mark> writes, reads;
    size_t cells = 0;  // that have it
  };

  // A list with what `cell` remembers that belongs to `cells` cells alone.
  List& own_list(Cell& cell, size_t cells);
  void give_up_list(const Cell& cell, size_t cells);
  static void append_write(std::vector<Mark>& marks, const Mark& now);
  static void append_read(std::vector<Mark>& marks, const Mark& now);

  std::vector<Cell> cells_;
  std::deque<List> lists_{1};
  std::vector<uint32_t> unused_;
};

template <class Judge>
void Shadow::access(size_t offset, size_t bytes, const Mark& now, bool writes, Judge& judge) {
  const size_t end = offset + bytes;
  for (size_t begin = offset, next; begin < end; begin = next) {
    Cell cell = cells_[begin];
    for (next = begin + 1; next < end && cells_[next] == cell;) ++next;

    judge.meets(this->writes(begin), true, begin);
    if (writes) judge.meets(this->reads(begin), false, begin);
    if (writes && now.kind == Kind::plain) {
      // Ordered before it or reported: nobody else is left.
      give_up_list(cell, next - begin);
      cell = Cell{now, Mark{}, 0};
    } else if (Mark& last = writes ? cell.write : cell.read;
               cell.list == 0 && (last.actor == Mark::kNobody || judge.replaces(last))) {
      last = now;
      if (writes && cell.read.actor != Mark::kNobody && judge.replaces(cell.read))
        cell.read = Mark{};
    } else {
      List& list = own_list(cell, next - begin);
      if (writes) {
        append_write(list.writes, now);
      } else {
        append_read(list.reads, now);
      }
    }
    for (size_t i = begin; i < next; ++i) cells_[i] = cell;
  }
}

}  // namespace cuda_emulator
