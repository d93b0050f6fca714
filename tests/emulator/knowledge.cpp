#include "knowledge.h"

#include <algorithm>

namespace cuda_emulator {
namespace {

// The union of two lists that are sorted by `key`, with `better` of two equals.
template <class T, class Key, class Better>
std::vector<T> merged(const std::vector<T>& a, const std::vector<T>& b, Key key, Better better) {
  std::vector<T> all;
  all.reserve(a.size() + b.size());
  auto i = a.begin();
  auto j = b.begin();
  while (i != a.end() && j != b.end()) {
    if (key(*i) < key(*j)) {
      all.push_back(*i++);
    } else if (key(*j) < key(*i)) {
      all.push_back(*j++);
    } else {
      all.push_back(better(*i++, *j++));
    }
  }
  all.insert(all.end(), i, a.end());
  all.insert(all.end(), j, b.end());
  return all;
}

}  // namespace

uint32_t Knowledge::floor(uint32_t block) const {
  const auto at = std::lower_bound(floors_.begin(), floors_.end(), block,
                                   [](const Floor& f, uint32_t b) { return f.block < b; });
  return at != floors_.end() && at->block == block ? at->barriers : 0;
}

bool Knowledge::covers(uint32_t block, uint32_t thread, Stamp stamp) const {
  if (stamp < stamp_at_barrier(floor(block))) return true;
  const auto at = std::lower_bound(exact_.begin(), exact_.end(), thread,
                                   [](const Done& e, uint32_t t) { return e.thread < t; });
  return at != exact_.end() && at->thread == thread && stamp <= at->stamp;
}

Known Knowledge::both(const Known& a, const Known& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  // All threads of a block mostly know the same and learn the same: then they share the result.
  static Known last_a, last_b, last;
  if (a == last_a && b == last_b) return last;
  auto made = std::make_shared<Knowledge>();
  made->floors_ = merged(
      a->floors_, b->floors_, [](const Floor& f) { return f.block; },
      [](const Floor& f, const Floor& g) { return f.barriers < g.barriers ? g : f; });
  made->exact_ = merged(
      a->exact_, b->exact_, [](const Done& e) { return e.thread; },
      [](const Done& e, const Done& f) { return e.stamp < f.stamp ? f : e; });
  std::erase_if(made->exact_,
                [&](const Done& e) { return e.stamp < stamp_at_barrier(made->floor(e.block)); });
  last_a = a;
  last_b = b;
  return last = made;
}

Known Knowledge::with(const Known& known, std::vector<Done> done) {
  std::sort(done.begin(), done.end(), [](const Done& a, const Done& b) {
    return a.thread != b.thread ? a.thread < b.thread : a.stamp > b.stamp;
  });
  const auto again = [](const Done& a, const Done& b) { return a.thread == b.thread; };
  done.erase(std::unique(done.begin(), done.end(), again), done.end());
  auto more = std::make_shared<Knowledge>();
  more->exact_ = std::move(done);
  return both(known, more);
}

Known Knowledge::with_floor(const Known& known, uint32_t block, uint32_t barriers) {
  auto more = std::make_shared<Knowledge>();
  more->floors_.push_back({block, barriers});
  return both(known, more);
}

}  // namespace cuda_emulator
