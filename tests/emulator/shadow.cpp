#include "shadow.h"

#include <algorithm>

namespace cuda_emulator {
namespace {

// A list of reads is put in order when it has doubled.
constexpr size_t kShort = 32;

std::span<const Mark> alone(const Mark& mark) {
  return {&mark, mark.actor == Mark::kNobody ? 0u : 1u};
}

// Drops each actor's accesses that a later one of its own outlasts.
void compact(std::vector<Mark>& marks) {
  std::stable_sort(marks.begin(), marks.end(),
                   [](const Mark& a, const Mark& b) { return a.actor < b.actor; });
  size_t kept = 0, first = 0;  // of this actor
  for (const Mark mark : marks) {
    if (kept > first && marks[first].actor != mark.actor) first = kept;
    while (kept > first && mark.outlasts(marks[kept - 1])) --kept;
    marks[kept++] = mark;
  }
  marks.resize(kept);
}

}  // namespace

size_t Shadow::end_of_run(size_t offset) const {
  size_t end = offset + 1;
  while (end < cells_.size() && cells_[end] == cells_[offset]) ++end;
  return end;
}

std::span<const Mark> Shadow::writes(size_t offset) const {
  const Cell& cell = cells_[offset];
  return cell.list == 0 ? alone(cell.write) : std::span<const Mark>(lists_[cell.list].writes);
}

std::span<const Mark> Shadow::reads(size_t offset) const {
  const Cell& cell = cells_[offset];
  return cell.list == 0 ? alone(cell.read) : std::span<const Mark>(lists_[cell.list].reads);
}

Shadow::List& Shadow::own_list(Cell& cell, size_t cells) {
  if (cell.list != 0 && lists_[cell.list].cells == cells) return lists_[cell.list];
  if (unused_.empty()) {
    unused_.push_back(static_cast<uint32_t>(lists_.size()));
    lists_.emplace_back();
  }
  const uint32_t number = unused_.back();
  unused_.pop_back();
  List& list = lists_[number];
  if (cell.list != 0) {
    list = lists_[cell.list];
    lists_[cell.list].cells -= cells;
  } else {
    for (const Mark& mark : alone(cell.write)) list.writes.push_back(mark);
    for (const Mark& mark : alone(cell.read)) list.reads.push_back(mark);
  }
  list.cells = cells;
  cell = Cell{Mark{}, Mark{}, number};
  return list;
}

void Shadow::give_up_list(const Cell& cell, size_t cells) {
  if (cell.list == 0) return;
  List& list = lists_[cell.list];
  list.cells -= cells;
  if (list.cells > 0) return;
  list.writes.clear();
  list.reads.clear();
  unused_.push_back(cell.list);
}

void Shadow::append_write(std::vector<Mark>& marks, const Mark& now) {
  std::erase_if(marks,
                [&](const Mark& mark) { return mark.actor == now.actor && now.outlasts(mark); });
  marks.push_back(now);
}

void Shadow::append_read(std::vector<Mark>& marks, const Mark& now) {
  if (!marks.empty() && marks.back().actor == now.actor && now.outlasts(marks.back())) {
    marks.back() = now;
    return;
  }
  if (marks.size() == marks.capacity() && marks.size() >= kShort) {
    compact(marks);
    marks.reserve(2 * marks.size() + 1);
  }
  marks.push_back(now);
}

}  // namespace cuda_emulator
