#include "race.h"

#include <algorithm>

namespace cuda_emulator {

void RaceDetector::Sight::add(const Sight& other) {
  known = Knowledge::both(known, other.known);
  for (unsigned r = 0; r < kReach; ++r) {
    published[r] = Knowledge::both(published[r], other.published[r]);
    pending[r] = Knowledge::both(pending[r], other.pending[r]);
  }
}

bool RaceDetector::Sight::same_as(const Sight& other) const {
  return known == other.known && std::equal(published, published + kReach, other.published) &&
         std::equal(pending, pending + kReach, other.pending);
}

void RaceDetector::begin(const GridEvent& grid) {
  work_ = {
      grid.kernel, grid.threads, static_cast<uint32_t>(grid.blocks * grid.threads), grid.order, {}};
  cluster_blocks_ = std::max(1u, grid.cluster_blocks);
  actors_.assign(work_.actors, {});
  agent_stamps_.assign(work_.actors, 0);
  barriers_.assign(grid.blocks, 0);
  asked_ = {};
}

void RaceDetector::begin_operation(const char* name, const WorkOrder& order) {
  begin({name, 1, 1, 1, order});
}

void RaceDetector::end() {
  released_.clear();
  objects_.clear();
  copies_.clear();
  actors_.clear();
  std::erase_if(work_.touched, [](const auto& item) { return !item.second.region->global(); });
  for (const Work& before : past_) {
    if (!work_.order.comes_after(before.order)) compare(before, work_);
  }
  past_.push_back(std::move(work_));
  work_ = {};
}

Done RaceDetector::done_by(Place place) const {
  const uint32_t actor = actor_of(place);
  return {static_cast<uint32_t>(place.block), actor, actors_[actor].stamp};
}

RaceDetector::Reach RaceDetector::distance(uint32_t block, uint32_t other) const {
  if (block == other) return same_block;
  return block / cluster_blocks_ == other / cluster_blocks_ ? same_cluster : same_device;
}

RaceDetector::Reach RaceDetector::reach_of(Scope scope) {
  switch (scope) {
    case Scope::block:
      return same_block;
    case Scope::cluster:
      return same_cluster;
    default:
      return same_device;
  }
}

// ---- what orders

// All before the meeting with all after it.
void RaceDetector::meet(const std::vector<uint32_t>& actors) {
  asked_ = {};
  Sight all = actors_[actors.front()].sight;
  const Sight* last = nullptr;
  for (const uint32_t a : actors) {
    if (last == nullptr || !actors_[a].sight.same_as(*last)) all.add(actors_[a].sight);
    last = &actors_[a].sight;
  }
  std::vector<Done> done;
  for (const uint32_t a : actors) done.push_back({block_of(a), a, actors_[a].stamp});
  all.known = Knowledge::with(all.known, std::move(done));
  for (const uint32_t a : actors) {
    ++actors_[a].stamp;
    actors_[a].sight = all;
  }
}

void RaceDetector::barrier(uint64_t block, std::span<const unsigned> threads) {
  if (threads.size() == work_.threads) {
    const uint64_t blocks[] = {block};
    blocks_sync(blocks);
    return;
  }
  std::vector<uint32_t> actors;
  for (const unsigned t : threads) actors.push_back(actor_of({block, t}));
  meet(actors);
}

void RaceDetector::warp_sync(uint64_t block, unsigned warp, unsigned lanes) {
  std::vector<uint32_t> actors;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes >> lane & 1) actors.push_back(actor_of({block, warp * kWarpLanes + lane}));
  }
  meet(actors);
}

void RaceDetector::blocks_sync(std::span<const uint64_t> blocks) {
  asked_ = {};
  Sight all;
  for (const uint64_t block : blocks) {
    const Sight* last = nullptr;
    for (unsigned t = 0; t < work_.threads; ++t) {
      const Sight& sight = actors_[actor_of({block, t})].sight;
      if (last == nullptr || !sight.same_as(*last)) all.add(sight);
      last = &sight;
    }
  }
  for (const uint64_t block : blocks) {
    all.known = Knowledge::with_floor(all.known, static_cast<uint32_t>(block), ++barriers_[block]);
  }
  for (const uint64_t block : blocks) {
    for (unsigned t = 0; t < work_.threads; ++t) {
      Actor& actor = actors_[actor_of({block, t})];
      actor.stamp = stamp_at_barrier(barriers_[block]);
      actor.sight = all;
    }
  }
}

void RaceDetector::arrives(Place place, const void* object) {
  Actor& actor = actors_[actor_of(place)];
  objects_[object].sight.add(actor.sight);
  objects_[object].arrived.push_back(done_by(place));
  ++actor.stamp;
}

void RaceDetector::waited(Place place, const void* object) {
  asked_ = {};
  const auto found = objects_.find(object);
  if (found == objects_.end()) return;
  auto& [sight, arrived] = found->second;
  if (!arrived.empty()) sight.known = Knowledge::with(sight.known, std::move(arrived));
  arrived.clear();
  actors_[actor_of(place)].sight.add(sight);
}

void RaceDetector::fence(Place place, Scope scope) {
  asked_ = {};
  Actor& actor = actors_[actor_of(place)];
  Sight& sight = actor.sight;
  const Reach reach = reach_of(scope);
  for (unsigned r = 0; r <= reach; ++r)
    sight.known = Knowledge::both(sight.known, sight.pending[r]);
  const Known mine = Knowledge::with(sight.known, {done_by(place)});
  for (unsigned r = 0; r <= reach; ++r) sight.published[r] = mine;
  ++actor.stamp;
}

void RaceDetector::release(const void* address, uint32_t block, Reach reach, const Known& known) {
  if (known == nullptr) return;
  std::vector<Released>& all = released_[address];
  for (Released& one : all) {
    if (one.block == block && one.reach == reach) {
      one.known = Knowledge::both(one.known, known);
      return;
    }
  }
  all.push_back({block, reach, known});
}

void RaceDetector::atomic(Place place, const AtomicEvent& event) {
  asked_ = {};
  Actor& actor = actors_[actor_of(place)];
  Sight& sight = actor.sight;
  const auto block = static_cast<uint32_t>(place.block);
  const Reach reach = reach_of(event.scope);
  const bool acquires = event.order != MemoryOrder::relaxed && event.order != MemoryOrder::release;
  const bool releases = event.order != MemoryOrder::relaxed && event.order != MemoryOrder::acquire;

  if (event.reads) {
    if (const auto found = released_.find(event.address); found != released_.end()) {
      for (const Released& one : found->second) {
        const Reach apart = distance(block, one.block);
        if (one.reach < apart || reach < apart) continue;
        Known& to = acquires ? sight.known : sight.pending[apart];
        to = Knowledge::both(to, one.known);
      }
    }
  }
  if (!event.writes) return;
  // A plain store begins anew; a read-modify-write carries on what was released before it.
  if (!event.reads) released_.erase(event.address);
  for (unsigned r = 0; r < kReach; ++r) {
    release(event.address, block, std::min(static_cast<Reach>(r), reach), sight.published[r]);
  }
  if (releases) {
    release(event.address, block, reach, Knowledge::with(sight.known, {done_by(place)}));
    ++actor.stamp;
  }
}

// ---- accesses

bool RaceDetector::covers(uint32_t knower, const Mark& mark) {
  if (asked_.knower == knower && asked_.actor == mark.actor && asked_.stamp == mark.stamp) {
    return asked_.covers;
  }
  const Known& known = actors_[knower].sight.known;
  const uint32_t block = work_.is_agent(mark.actor) ? kNobody : block_of(mark.actor);
  asked_ = {knower, mark.actor, mark.stamp,
            known != nullptr && known->covers(block, mark.actor, mark.stamp)};
  return asked_.covers;
}

bool RaceDetector::ordered(const Mark& before, uint32_t actor, uint32_t knower) {
  return before.actor == actor || before.actor == knower || covers(knower, before);
}

bool RaceDetector::conflict(const Mark& before, const Mark& now, uint32_t knower) {
  if (before.actor == now.actor || before.actor == knower) return false;
  return !reach_each_other(before, now) && !covers(knower, before);
}

bool RaceDetector::reach_each_other(const Mark& a, const Mark& b) const {
  if (a.kind != Kind::atomic || b.kind != Kind::atomic) return false;
  const Reach apart = distance(block_of(a.actor), block_of(b.actor));
  return reach_of(a.scope) >= apart && reach_of(b.scope) >= apart;
}

// Updates of one byte that reach each other are in an order of their own: what comes after the last
// comes after all of them, there. So the last block to count itself may reset the counter.
bool RaceDetector::observed(std::span<const Mark> writes, size_t i, const Mark& now,
                            uint32_t knower) {
  for (const Mark& later : writes.subspan(i + 1)) {
    if (!later.update || !reach_each_other(writes[i], later)) continue;
    if (ordered(later, now.actor, knower)) return true;
  }
  return false;
}

void RaceDetector::access(const Access& access) {
  const uint32_t actor = actor_of(access.place);
  mark(access, actor, actors_[actor].stamp, actor);
}

void RaceDetector::mark(const Access& access, uint32_t actor, Stamp stamp, uint32_t knower) {
  if (codes_.size() <= access.site) codes_.resize(access.site + 1);
  codes_[access.site] = access.code;
  auto touched = work_.touched.find(access.region->index);
  if (touched == work_.touched.end()) {
    Touched fresh{access.region, Shadow(access.region->bytes)};
    touched = work_.touched.emplace(access.region->index, std::move(fresh)).first;
  }
  const Mark now{actor,        static_cast<uint16_t>(access.site),
                 access.kind,  access.kind == Kind::atomic && access.reads && access.writes,
                 access.scope, stamp};

  struct {
    RaceDetector& detector;
    const Access& access;
    const Mark& now;
    uint32_t knower;

    void meets(std::span<const Mark> all, bool writes, size_t offset) {
      for (size_t i = 0; i < all.size(); ++i) {
        if (!detector.conflict(all[i], now, knower)) continue;
        if (writes && detector.observed(all, i, now, knower)) continue;
        detector.report(all[i], writes, access, now, offset);
      }
    }
    bool replaces(const Mark& before) {
      if (!now.outlasts(before)) return false;
      const bool plain = now.kind == Kind::plain;
      if (!plain && detector.block_of(now.actor) != detector.block_of(before.actor)) return false;
      return detector.ordered(before, now.actor, knower);
    }
  } judge{*this, access, now, knower};
  touched->second.shadow.access(access.offset, access.bytes, now, access.writes, judge);
}

void RaceDetector::copy_access(Access access, uint64_t id) {
  const uint32_t issuer = actor_of(access.place);
  const auto [place, added] = copies_.try_emplace(id);
  if (added) {
    place->second = {work_.actors + issuer, ++agent_stamps_[issuer]};
  }
  mark(access, place->second.agent, place->second.stamp, issuer);
}

void RaceDetector::copy_completed(Place place, uint64_t id, const void* object) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return;
  asked_ = {};
  const Copy copy = found->second;
  Known& to =
      object != nullptr ? objects_[object].sight.known : actors_[actor_of(place)].sight.known;
  to = Knowledge::with(to, {{kNobody, copy.agent, copy.stamp}});
  copies_.erase(found);
}

// ---- reports

RaceReport::Side RaceDetector::side(const Work& work, const Mark& mark, bool reads,
                                    bool writes) const {
  const bool atomic = mark.kind == Kind::atomic;
  const char* what = writes ? (reads ? "update" : "write") : "read";
  if (atomic) what = writes ? (reads ? "atomic update" : "atomic write") : "atomic read";
  return {work.place_of(mark.actor), codes_[mark.site], what, work.is_agent(mark.actor)};
}

void RaceDetector::report(const Mark& before, bool before_writes, const Access& access,
                          const Mark& now, size_t offset) {
  if (reports_.size() == kMostReports) return;
  if (!seen_.insert({before.site, {now.site, access.region->name}}).second) return;
  RaceReport race{work_.name,
                  access.region->name,
                  offset,
                  side(work_, before, !before_writes, before_writes),
                  side(work_, now, access.reads, access.writes),
                  ""};
  const auto text = [](Scope scope) { return scope == Scope::block ? "block" : "cluster"; };
  if (before.kind == Kind::atomic && now.kind == Kind::atomic) {
    const Mark& narrow = reach_of(before.scope) < reach_of(now.scope) ? before : now;
    race.why = std::string("an atomic of ") + text(narrow.scope) +
               " scope does not reach the other thread";
  } else if (work_.is_agent(before.actor)) {
    race.why = "the asynchronous copy has not been waited for";
  }
  reports_.push_back(race);
}

// ---- between streams

namespace {

// The one with which most can race, null when there is none.
const Mark* farthest(std::span<const Mark> marks) {
  const Mark* found = nullptr;
  for (const Mark& mark : marks) {
    if (found == nullptr || mark.outlasts(*found)) found = &mark;
  }
  return found;
}

}  // namespace

void RaceDetector::compare(const Work& before, const Work& now) {
  for (const auto& [index, here] : now.touched) {
    const auto found = before.touched.find(index);
    if (found != before.touched.end()) compare(before, found->second.shadow, now, here);
  }
}

void RaceDetector::compare(const Work& before, const Shadow& then, const Work& now,
                           const Touched& here) {
  size_t then_ends = 0, here_ends = 0;
  for (size_t i = 0; i < then.bytes(); i = std::min(then_ends, here_ends)) {
    if (i == then_ends) then_ends = then.end_of_run(i);
    if (i == here_ends) here_ends = here.shadow.end_of_run(i);
    const auto check = [&](const Mark* one, bool one_writes, const Mark* other, bool other_writes) {
      if (one == nullptr || other == nullptr || reports_.size() == kMostReports) return;
      const bool reach =
          reach_of(one->scope) == same_device && reach_of(other->scope) == same_device;
      if (one->kind == Kind::atomic && other->kind == Kind::atomic && reach) return;
      if (!seen_.insert({one->site, {other->site, here.region->name}}).second) return;
      reports_.push_back({now.name, here.region->name, i,
                          side(before, *one, !one_writes, one_writes),
                          side(now, *other, !other_writes, other_writes),
                          before.name + " is in another stream, and nothing orders the two"});
    };
    const Mark* written = farthest(then.writes(i));
    const Mark* writes = farthest(here.shadow.writes(i));
    check(written, true, writes, true);
    check(written, true, farthest(here.shadow.reads(i)), false);
    check(farthest(then.reads(i)), false, writes, true);
  }
}

}  // namespace cuda_emulator
