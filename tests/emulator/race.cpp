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
  kernel_ = grid.kernel;
  threads_ = grid.threads;
  cluster_blocks_ = std::max(1u, grid.cluster_blocks);
  actors_.assign(grid.blocks * grid.threads, {});
  agent_stamps_.assign(actors_.size(), 0);
  barriers_.assign(grid.blocks, 0);
  asked_ = {};
}

// What another grid does comes after all of this one.
void RaceDetector::end() {
  shadows_.clear();
  released_.clear();
  objects_.clear();
  copies_.clear();
  actors_.clear();
}

Place RaceDetector::place_of(uint32_t actor) const {
  const uint32_t thread = actor % static_cast<uint32_t>(actors_.size());
  return {thread / threads_, thread % threads_};
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
  if (threads.size() == threads_) {
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
    for (unsigned t = 0; t < threads_; ++t) {
      const Sight& sight = actors_[actor_of({block, t})].sight;
      if (last == nullptr || !sight.same_as(*last)) all.add(sight);
      last = &sight;
    }
  }
  for (const uint64_t block : blocks) {
    all.known = Knowledge::with_floor(all.known, static_cast<uint32_t>(block), ++barriers_[block]);
  }
  for (const uint64_t block : blocks) {
    for (unsigned t = 0; t < threads_; ++t) {
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
  const uint32_t block = is_agent(mark.actor) ? kNobody : block_of(mark.actor);
  asked_ = {knower, mark.actor, mark.stamp,
            known != nullptr && known->covers(block, mark.actor, mark.stamp)};
  return asked_.covers;
}

bool RaceDetector::conflict(const Mark& before, const Mark& now, uint32_t knower) {
  if (before.actor == kNobody || before.actor == now.actor || before.actor == knower) return false;
  if (before.kind == Kind::atomic && now.kind == Kind::atomic) {
    const Reach apart = distance(block_of(before.actor), block_of(now.actor));
    if (reach_of(before.scope) >= apart && reach_of(now.scope) >= apart) return false;
  }
  return !covers(knower, before);
}

void RaceDetector::access(const Access& access) {
  const uint32_t actor = actor_of(access.place);
  mark(access, actor, actors_[actor].stamp, actor);
}

void RaceDetector::mark(const Access& access, uint32_t actor, Stamp stamp, uint32_t knower) {
  if (codes_.size() <= access.site) codes_.resize(access.site + 1);
  codes_[access.site] = access.code;
  std::vector<Cell>& shadow = shadows_[access.region->index];
  if (shadow.empty()) shadow.resize(access.region->bytes);
  const Mark now{actor, static_cast<uint16_t>(access.site), access.kind, access.scope, stamp};

  Cell before, after;  // of the last byte: mostly the next one's too
  for (size_t i = access.offset; i < access.offset + access.bytes; ++i) {
    Cell& cell = shadow[i];
    if (i > access.offset && cell == before) {
      cell = after;
      continue;
    }
    before = cell;
    if (conflict(cell.write, now, knower)) report(cell.write, true, access, now, i);
    if (access.writes) {
      for (const Mark& read : cell.reads) {
        if (conflict(read, now, knower)) report(read, false, access, now, i);
      }
      cell.write = now;
      cell.reads[0] = cell.reads[1] = {};
    } else {
      const auto replaceable = [&](const Mark& read) {
        return read.actor == kNobody || read.actor == actor || covers(knower, read);
      };
      cell.reads[replaceable(cell.reads[0]) ? 0 : 1] = now;
    }
    after = cell;
  }
}

void RaceDetector::copy_access(Access access, uint64_t id) {
  const uint32_t issuer = actor_of(access.place);
  const auto [place, added] = copies_.try_emplace(id);
  if (added) {
    place->second = {static_cast<uint32_t>(actors_.size()) + issuer, ++agent_stamps_[issuer]};
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

RaceReport::Side RaceDetector::side(const Mark& mark, bool reads, bool writes) const {
  const bool atomic = mark.kind == Kind::atomic;
  const char* what = writes ? (reads ? "update" : "write") : "read";
  if (atomic) what = writes ? (reads ? "atomic update" : "atomic write") : "atomic read";
  return {place_of(mark.actor), codes_[mark.site], what, is_agent(mark.actor)};
}

void RaceDetector::report(const Mark& before, bool before_writes, const Access& access,
                          const Mark& now, size_t offset) {
  if (reports_.size() == kMostReports) return;
  if (!seen_.insert({before.site, {now.site, access.region->name}}).second) return;
  RaceReport race{kernel_,
                  access.region->name,
                  offset,
                  side(before, !before_writes, before_writes),
                  side(now, access.reads, access.writes),
                  ""};
  const auto text = [](Scope scope) { return scope == Scope::block ? "block" : "cluster"; };
  if (before.kind == Kind::atomic && now.kind == Kind::atomic) {
    const Mark& narrow = reach_of(before.scope) < reach_of(now.scope) ? before : now;
    race.why = std::string("an atomic of ") + text(narrow.scope) +
               " scope does not reach the other thread";
  } else if (is_agent(before.actor)) {
    race.why = "the asynchronous copy has not been waited for";
  }
  reports_.push_back(race);
}

}  // namespace cuda_emulator
