#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>

#include "kernel.h"
#include "streams.h"
#include "trap.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace cuda_emulator {

Observer* the_observer = nullptr;

namespace {

// What goes on between run()'s beginning and its end.
struct Running {
  const Grid* grid = nullptr;
  std::vector<Block*> active;
  SplitBarrier barrier;  // the grid's
  // A turn: the lanes of one warp that run one after the other.
  Thread* thread = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned first = 0;  // the warp's first thread
  unsigned turn = 0;   // lanes that are still to run
  // Signs of life, for telling a spin that ends from one that does not.
  uint64_t changes = 0;  // atomics that left a new value, threads that ended, blocks that began
  bool gave_way = false, by_force = false, released = false, elsewhere = false;
  // A fault that a signal told of.
  const void* fault_address = nullptr;
  const void* fault_code = nullptr;
  const Thread* faulted = nullptr;
};
Running now;
uint64_t turn_count = 0;
SharedLayout layout;

// Blocks keep their fibers' stacks and their shared memory from one launch to the next.
std::vector<std::unique_ptr<Block>>& pool() {
  static std::vector<std::unique_ptr<Block>> instance;
  return instance;
}

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

uint3 unflatten(uint64_t i, dim3 shape) {
  return make_uint3(static_cast<unsigned>(i % shape.x),
                    static_cast<unsigned>(i / shape.x % shape.y),
                    static_cast<unsigned>(i / shape.x / shape.y));
}

uint64_t flatten(uint3 i, dim3 shape) { return (uint64_t{i.z} * shape.y + i.y) * shape.x + i.x; }

// The numbers below `count` in the chosen order.
void put_in_order(std::vector<unsigned>& order, unsigned count) {
  order.resize(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings().order == Order::reverse) std::reverse(order.begin(), order.end());
  if (settings().order == Order::random) {
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
}

// One of the set bits, by the chosen order.
unsigned pick(unsigned lanes) {
  switch (settings().order) {
    case Order::forward:
      return static_cast<unsigned>(__builtin_ctz(lanes));
    case Order::reverse:
      return 31 - static_cast<unsigned>(__builtin_clz(lanes));
    case Order::random:
      break;
  }
  const auto turned_by = static_cast<unsigned>(random_below(32));
  const unsigned turned = lanes >> turned_by | lanes << (-turned_by & 31);
  return (static_cast<unsigned>(__builtin_ctz(turned)) + turned_by) & 31;
}

bool same_place(const Site& a, const Site& b) {
  if (a.line() != b.line() || a.column() != b.column()) return false;
  return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::warp:
      return "a warp collective";
    case Wait::barrier:
      return "a barrier of the block";
    case Wait::cluster:
      return "a cluster barrier";
    case Wait::grid:
      return "grid.sync()";
    case Wait::nothing:
      break;
  }
  return "nothing";
}

}  // namespace

std::string Thread::place() const { return code == nullptr ? where(site) : source_of(code); }

Thread& current() {
  if (now.thread == nullptr) throw Error("device code called outside a kernel");
  return *now.thread;
}

bool in_kernel() { return now.thread != nullptr; }

unsigned live_lanes() {
  current();
  return now.warp->exist & ~now.warp->done;
}

uint64_t turns() { return turn_count; }

// The next thread of the turn becomes the running one; the scheduler itself after the last.
Fiber& next_fiber() {
  if (now.turn == 0) {
    now.thread = nullptr;
    return Fiber::main();
  }
  const unsigned lane = pick(now.turn);
  now.turn &= ~(1u << lane);
  now.warp->ready &= ~(1u << lane);
  Thread& thread = now.block->pool_[now.first + lane];
  now.thread = &thread;
  threadIdx = thread.index;
  ++turn_count;
  if (Observer* o = observer()) o->thread_runs(now.block->linear(), thread.linear);
  return thread.fiber;
}

namespace {

// Stops the running thread; it goes on when its block lets it.
void stop(Thread& thread) {
  if (Observer* o = observer()) o->thread_stops();
  thread.fiber.switch_to(next_fiber());
}

}  // namespace

bool Cluster::done() const {
  return std::all_of(blocks.begin(), blocks.end(), [](const Block* b) { return b->done(); });
}

void Block::start(const Grid& grid, Cluster* cluster, unsigned rank, uint3 index) {
  grid_ = &grid;
  cluster_ = cluster;
  rank_ = rank;
  index_ = index;
  threads_ = grid.block_threads();
  live_ = threads_;
  begun_ = false;
  shared_.begin(layout);
  if (grid.cluster_blocks() > 1) shared_.set_reachable(false);
  failure_ = nullptr;
  std::fill(std::begin(barriers_), std::end(barriers_), Barrier{});
  barriers_complete_ = 0;
  grid_site_generation_ = ~uint64_t{0};
  if (pool_size_ < threads_) {
    pool_ = std::make_unique<Thread[]>(threads_);
    pool_size_ = threads_;
  }
  for (unsigned i = 0; i < threads_; ++i) {
    Thread& thread = pool_[i];
    thread.block = this;
    thread.index = unflatten(i, grid.threads);
    thread.linear = i;
    thread.done = false;
    thread.wait = Wait::nothing;
    thread.seen_address = nullptr;
    thread.cluster_arrived = thread.grid_arrived = false;
    thread.copies.clear();
    thread.fiber.start(&Block::run_thread, &thread);
  }
  for (unsigned first = 0; first < threads_; first += 32) {
    Warp& warp = warps_[first / 32];
    const unsigned lanes = std::min(32u, threads_ - first);
    warp.exist = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.done = warp.later = warp.meeting = 0;
  }
  if (Observer* o = observer()) {
    o->block_starts(linear());
    if (grid.dynamic_shared > 0) {
      o->shared_memory(linear(), "dynamic shared memory", shared_.data(), grid.dynamic_shared);
    }
  }
}

Fiber& Block::run_thread(void* context) {
  auto& thread = *static_cast<Thread*>(context);
  Block& block = *thread.block;
  try {
    InRuntime::inside = false;
    block.grid_->body();
    InRuntime::inside = true;
  } catch (...) {
    InRuntime::inside = true;
    block.failure_ = std::current_exception();
  }
  if (Observer* o = observer()) o->thread_stops();
  block.ended(thread);
  if (block.failure_) now.turn = 0;
  return next_fiber();
}

void Block::ended(Thread& thread) {
  thread.done = true;
  --live_;
  ++now.changes;
  warps_[thread.linear / 32].done |= 1u << thread.lane();
  // A cluster barrier waits for the threads that have not exited.
  SplitBarrier& barrier = cluster_->barrier;
  --barrier.expected;
  if (thread.cluster_arrived && thread.cluster_token == barrier.generation) --barrier.arrived;
  if (barrier.arrived > 0 && barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.whole = false;
    for (Block* block : cluster_->blocks) block->wake(Wait::cluster);
  }
}

namespace {

std::string what_is_at(const void* address, const Thread& thread) {
  char number[32];
  std::snprintf(number, sizeof number, "address %p", address);
  if (thread.fiber.overflowed_at(address)) return std::string(number) + ": its stack has run out";
  for (Block* block : now.active) {
    if (!block->shared().holds(address)) continue;
    return "shared memory of block " + text(block->index()) + ", which " +
           (block->begun() ? "has exited" : "has not started");
  }
  return std::string(number) + ", which is no memory";
}

}  // namespace

void Block::run_turn(Warp& warp, unsigned first) {
  now.block = this;
  now.warp = &warp;
  now.first = first;
  now.turn = warp.ready;
  if (settings().order == Order::random) {
    // Some of them may be left behind.
    const auto some = static_cast<unsigned>(random_below(uint64_t{1} << 32));
    if (some % 4 == 0 && (warp.ready & some) != 0) now.turn &= some;
  }
  Fiber::main().switch_to(next_fiber());
  if (now.faulted != nullptr) {
    throw error(*now.faulted, "touches " + what_is_at(now.fault_address, *now.faulted),
                source_of(now.fault_code));
  }
  if (failure_) std::rethrow_exception(failure_);
}

bool Block::step() {
  blockIdx = index_;
  blockDim = grid_->threads;
  gridDim = grid_->blocks;
  if (!begun_) {
    begun_ = true;
    ++now.changes;
    shared_.set_reachable(true);
  }
  bool moved = false;
  const unsigned warps = (threads_ + 31) / 32;
  for (unsigned w = 0; w < warps; ++w) {
    warps_[w].ready |= warps_[w].later;
    warps_[w].later = 0;
  }
  static std::vector<unsigned> order;
  put_in_order(order, warps);
  for (unsigned w : order) {
    Warp& warp = warps_[w];
    // A warp runs as far ahead of the others as their barriers let it: so a missing one shows.
    // Under a random schedule it may also stop anywhere on the way.
    while (warp.ready != 0) {
      run_turn(warp, w * 32);
      moved = true;
      if (warp.meeting != 0) release_warp(warp, w * 32);
      if (settings().order == Order::random && random_below(4) == 0) break;
    }
  }
  if (release_barriers()) moved = true;
  if (done() && grid_->cluster_blocks() > 1) shared_.set_reachable(false);
  return moved;
}

// ---------------------------------------------------------------- warp collectives

void Block::meet(Thread& thread) {
  Warp& warp = warps_[thread.linear / 32];
  if (warp.meeting == 0) {
    warp.uniform = true;
  } else {
    const Thread& other =
        pool_[thread.linear - thread.lane() + static_cast<unsigned>(__builtin_ctz(warp.meeting))];
    if (other.mask != thread.mask || other.collective != thread.collective) warp.uniform = false;
  }
  warp.meeting |= 1u << thread.lane();
  stop(thread);
}

void Block::release_warp(Warp& warp, unsigned first) {
  if (warp.uniform) {
    const unsigned leader = static_cast<unsigned>(__builtin_ctz(warp.meeting));
    if (pool_[first + leader].mask == warp.meeting) {
      exchange(warp, first, warp.meeting);
      return;
    }
  }
  check_meeting(warp, first);
}

// Lets the lanes go that have met among those that wait, and says what cannot end well.
void Block::check_meeting(Warp& warp, unsigned first) {
  const unsigned alive = warp.exist & ~warp.done;
  unsigned looked_at = 0;
  for (unsigned rest = warp.meeting; rest != 0; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
    if (looked_at >> lane & 1) continue;
    const Thread& leader = pool_[first + lane];
    looked_at |= leader.mask;
    if ((leader.mask & ~alive) != 0) {
      fail(leader, "warp collective whose mask names a lane that has exited or does not exist",
           leader.site);
    }
    unsigned here = 0;
    for (unsigned k = 0; k < 32; ++k) {
      const Thread& thread = pool_[first + k];
      if (!(leader.mask >> k & 1) || thread.wait == Wait::nothing) continue;
      if (thread.wait != Wait::warp) {
        fail(thread,
             std::string("deadlock: waits in ") + name_of(thread.wait) +
                 " while its warp waits for it in a collective at " + where(leader.site),
             thread.site);
      }
      if (thread.mask != leader.mask || thread.collective != leader.collective) {
        fail(thread,
             "lanes of one warp meet in different collectives or with different masks, "
             "the other at " +
                 where(leader.site),
             thread.site);
      }
      here |= 1u << k;
    }
    if (here == leader.mask) exchange(warp, first, here);
  }
}

// Gives the lanes of a warp that have met what their collective brings them.
void Block::exchange(Warp& warp, unsigned first, unsigned lanes) {
  const Collective collective =
      pool_[first + static_cast<unsigned>(__builtin_ctz(lanes))].collective;
  const auto each = [&](auto&& visit) {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      visit(static_cast<unsigned>(__builtin_ctz(rest)));
    }
  };
  // All values are read before any lane goes on: the next collective may overwrite them.
  uint64_t all = 0;
  const auto fold = [&](auto&& combine) {
    bool begun = false;
    each([&](unsigned k) {
      all = begun ? static_cast<uint32_t>(combine(all, warp.value[k])) : warp.value[k];
      begun = true;
    });
  };
  const auto narrow = [](uint64_t x) { return static_cast<int32_t>(static_cast<uint32_t>(x)); };
  switch (collective) {
    case Collective::shuffle: {
      uint64_t results[32];
      each([&](unsigned k) {
        const unsigned source = warp.source[k];
        if (source >= 32 || !(lanes >> source & 1)) {
          fail(pool_[first + k],
               "shuffle from lane " + std::to_string(source) + ", which is outside the mask",
               pool_[first + k].site);
        }
        results[k] = warp.value[source];
      });
      each([&](unsigned k) { warp.value[k] = results[k]; });
      break;
    }
    case Collective::match_any: {
      uint64_t results[32] = {};
      each([&](unsigned k) {
        each([&](unsigned other) {
          if (warp.value[other] == warp.value[k]) results[k] |= uint64_t{1} << other;
        });
      });
      each([&](unsigned k) { warp.value[k] = results[k]; });
      break;
    }
    case Collective::match_all: {
      const uint64_t wanted = warp.value[__builtin_ctz(lanes)];
      bool same = true;
      each([&](unsigned k) { same = same && warp.value[k] == wanted; });
      all = same ? lanes : 0;
      break;
    }
    case Collective::ballot:
      each([&](unsigned k) {
        if (warp.value[k] != 0) all |= uint64_t{1} << k;
      });
      break;
    case Collective::add:
      fold([](uint64_t a, uint64_t b) { return a + b; });
      break;
    case Collective::min_signed:
      fold([&](uint64_t a, uint64_t b) { return std::min(narrow(a), narrow(b)); });
      break;
    case Collective::max_signed:
      fold([&](uint64_t a, uint64_t b) { return std::max(narrow(a), narrow(b)); });
      break;
    case Collective::min_unsigned:
      fold([](uint64_t a, uint64_t b) { return std::min(a, b); });
      break;
    case Collective::max_unsigned:
      fold([](uint64_t a, uint64_t b) { return std::max(a, b); });
      break;
    case Collective::bit_and:
      fold([](uint64_t a, uint64_t b) { return a & b; });
      break;
    case Collective::bit_or:
      fold([](uint64_t a, uint64_t b) { return a | b; });
      break;
    case Collective::bit_xor:
      fold([](uint64_t a, uint64_t b) { return a ^ b; });
      break;
    case Collective::sync:
      break;
  }
  if (collective != Collective::shuffle && collective != Collective::match_any) {
    each([&](unsigned k) { warp.value[k] = all; });
  }
  each([&](unsigned k) { pool_[first + k].wait = Wait::nothing; });
  warp.meeting &= ~lanes;
  warp.ready |= lanes;
  now.released = true;
  if (Observer* o = observer()) {
    o->warp_released(linear(), first / 32, lanes, collective == Collective::sync);
  }
}

// ---------------------------------------------------------------- barriers

void Block::arrive_at_barrier(Thread& thread, unsigned id, unsigned count, bool waits, bool aligned,
                              bool vote, const Site& site) {
  thread.at(site);
  if (id >= 16) fail(thread, "barrier " + std::to_string(id) + ", expected 0 to 15", site);
  const unsigned all = (threads_ + 31) / 32 * 32;
  if (count % 32 != 0 || count > all) {
    fail(thread,
         "barrier of " + std::to_string(count) + " threads, expected a multiple of 32 up to " +
             std::to_string(all),
         site);
  }
  const unsigned expected = count == 0 || count == all ? threads_ : count;
  // Who does not wait may come again before those who do have gone on.
  if (barriers_[id].split && barriers_complete_ >> id & 1) release_barriers();
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier = {expected, 0, 0, thread.linear, aligned};
  } else {
    const Thread& first = pool_[barrier.first];
    if (aligned && barrier.aligned && !same_place(first.site, site)) {
      fail(
          thread,
          "divergent __syncthreads: thread " + text(first.index) + " waits at " + where(first.site),
          site);
    }
    if (barrier.expected != expected) {
      fail(thread,
           "barrier " + std::to_string(id) + " of " + std::to_string(expected) +
               " threads, but thread " + text(first.index) + " waits there for " +
               std::to_string(barrier.expected) + " at " + where(first.site),
           site);
    }
  }
  ++barrier.arrived;
  barrier.votes += vote;
  if (barrier.arrived == barrier.expected) barriers_complete_ |= 1u << id;
  if (!waits) {
    barrier.split = true;
    if (Observer* o = observer()) o->arrives(&arrivals_[id]);
    return;
  }
  thread.barrier = id;
  thread.wait = Wait::barrier;
  thread.arrivals = nullptr;
  stop(thread);
  if (thread.arrivals == nullptr) return;
  if (Observer* o = observer()) o->waited(thread.arrivals);
}

bool Block::release_barriers() {
  for (unsigned id = 0; id < 16; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0 || barrier.arrived == barrier.expected) continue;
    if (barrier.expected == threads_ && barrier.arrived == live_ && live_ < threads_) {
      const Thread& first = pool_[barrier.first];
      fail(first,
           "divergent __syncthreads: " + std::to_string(threads_ - live_) +
               " threads of the block have exited",
           first.site);
    }
  }
  if (barriers_complete_ == 0) return false;
  static std::vector<unsigned> together;
  for (; barriers_complete_ != 0; barriers_complete_ &= barriers_complete_ - 1) {
    const unsigned id = static_cast<unsigned>(__builtin_ctz(barriers_complete_));
    together.clear();
    for (unsigned i = 0; i < threads_; ++i) {
      Thread& thread = pool_[i];
      if (thread.wait != Wait::barrier || thread.barrier != id) continue;
      thread.wait = Wait::nothing;
      thread.votes = barriers_[id].votes;
      if (barriers_[id].split) thread.arrivals = &arrivals_[id];
      warps_[i / 32].ready |= 1u << i % 32;
      together.push_back(i);
    }
    barriers_[id] = {};
    if (Observer* o = observer()) o->barrier_released(linear(), together);
  }
  now.released = true;
  return true;
}

void Block::wake(Wait wait) {
  for (unsigned i = 0; i < threads_; ++i) {
    if (pool_[i].done || pool_[i].wait != wait) continue;
    pool_[i].wait = Wait::nothing;
    warps_[i / 32].later |= 1u << i % 32;
  }
}

void Block::check_grid_site(const Thread& thread, const Site& site) {
  if (grid_site_generation_ != now.barrier.generation) {
    grid_site_generation_ = now.barrier.generation;
    grid_site_ = site;
  } else if (!same_place(grid_site_, site)) {
    fail(thread, "divergent grid.sync(): other threads of the block wait at " + where(grid_site_),
         site);
  }
}

// ---------------------------------------------------------------- spinning

void Block::give_way(Thread& thread) {
  warps_[thread.linear / 32].later |= 1u << thread.lane();
  now.gave_way = true;
  if (Observer* o = observer()) o->yields();
  stop(thread);
}

const Thread* Block::spinning() const {
  for (unsigned i = 0; i < threads_; ++i) {
    if (warps_[i / 32].later >> i % 32 & 1) return &pool_[i];
  }
  return nullptr;
}

// ---------------------------------------------------------------- memory and errors

void* Block::static_shared(SharedKey& key, size_t bytes, size_t alignment, const Site& site) {
  const InRuntime in_runtime;
  size_t i = 0;
  const size_t known = layout.variables().size();
  try {
    i = layout.find(key, bytes, alignment);
  } catch (const Error& error) {
    fail(current(), error.what(), site);
  }
  const SharedLayout::Variable& variable = layout.variables()[i];
  if (layout.variables().size() != known) {
    for (Block* block : now.active) block->shared_.admit(variable);
    Kernel& kernel = kernel_of(grid_->function);
    kernel.static_shared = std::max(kernel.static_shared, layout.static_bytes());
    // As the launch would have been refused, where this is known before.
    if (kernel.static_shared + layout.dynamic() > kernel.most_shared()) {
      fail(current(),
           "too much shared memory: " + std::to_string(kernel.static_shared) +
               " bytes static and " + std::to_string(layout.dynamic()) +
               " dynamic, cudaFuncSetAttribute has allowed " +
               std::to_string(kernel.most_shared()) + " together",
           site);
    }
  }
  if (shared_.first_use(i)) {
    if (Observer* o = observer()) {
      o->shared_memory(linear(), variable.name, shared_.data() + variable.offset, bytes);
    }
  }
  return shared_.data() + variable.offset;
}

uint64_t Block::linear() const { return flatten(index_, grid_->blocks); }

Error Block::error(const Thread& thread, const std::string& what, const std::string& place) const {
  InRuntime::inside = true;  // and stays: the thread ends with this
  return Error(grid_->kernel + ": block " + text(index_) + " thread " + text(thread.index) + ": " +
               what + ", at " + place + " " + schedule_text());
}

void Block::fail(const Thread& thread, const std::string& what, const Site& site) const {
  throw error(thread, what, where(site));
}

void Block::fail_deadlock() const {
  const Thread* first = nullptr;
  const Thread* other = nullptr;
  for (unsigned i = 0; i < threads_; ++i) {
    const Thread& thread = pool_[i];
    if (thread.done) continue;
    if (first == nullptr) {
      first = &thread;
    } else if (thread.wait != first->wait || !same_place(thread.site, first->site)) {
      other = &thread;
      break;
    }
  }
  if (first == nullptr) throw Error(grid_->kernel + ": deadlock " + schedule_text());
  std::string what = std::string("deadlock: waits in ") + name_of(first->wait);
  if (other != nullptr) {
    what += " while thread " + text(other->index) + " of the block waits in " +
            name_of(other->wait) + " at " + where(other->site);
  } else if (live_ < threads_) {
    what += " while " + std::to_string(threads_ - live_) + " threads of the block have exited";
  } else {
    what += " for threads that wait elsewhere or have exited";
  }
  throw error(*first, what, first->place());
}

// ---------------------------------------------------------------- the grid

namespace {

// Starts blocks as room comes free, gives each its turn, and ends with the last.
class GridRun {
 public:
  explicit GridRun(const Grid& grid) : grid_(grid) {
    static uint64_t grids = 0;
    now = {};
    now.grid = &grid;
    now.barrier.begin(grid.block_count() * grid.block_threads());
    layout.begin(++grids, grid.dynamic_shared);
    if (Observer* o = observer()) {
      o->grid_starts({grid.kernel, grid.block_count(), grid.block_threads(), grid.cluster_blocks(),
                      running_work()});
    }
    const unsigned size = grid.cluster_blocks();
    clusters_ = dim3(grid.blocks.x / grid.cluster.x, grid.blocks.y / grid.cluster.y,
                     grid.blocks.z / grid.cluster.z);
    const auto count = static_cast<unsigned>(grid.block_count() / size);
    put_in_order(order_, count);
    const auto limit = static_cast<unsigned>(std::max(1, settings().resident_blocks));
    const unsigned resident =
        grid.cooperative ? count : std::min(count, std::max(1u, limit / size));
    while (pool().size() < size_t{resident} * size) pool().push_back(std::make_unique<Block>());
    in_flight_.resize(resident);
    for (unsigned i = 0; i < resident; ++i) {
      for (unsigned r = 0; r < size; ++r) {
        in_flight_[i].blocks.push_back(pool()[size_t{i} * size + r].get());
      }
      idle_.push_back(&in_flight_[i]);
    }
  }

  ~GridRun() {
    for (Cluster& cluster : in_flight_) {
      for (Block* block : cluster.blocks) {
        block->shared().set_reachable(true);
        block->shared().finish(layout);
      }
    }
    now = {};
    if (Observer* o = observer()) o->grid_ends();
  }

  void operator()() {
    std::vector<unsigned> order;
    while (next_ < order_.size() || !now.active.empty()) {
      while (next_ < order_.size() && !idle_.empty()) start_cluster();
      const uint64_t changes = now.changes;
      now.gave_way = now.by_force = now.released = now.elsewhere = false;
      bool moved = false;
      put_in_order(order, static_cast<unsigned>(now.active.size()));
      for (unsigned i : order) {
        if (!now.active[i]->done() && now.active[i]->step()) moved = true;
      }
      if (!moved) first_live()->fail_deadlock();
      watch_spinning(changes);
      retire();
    }
  }

 private:
  void start_cluster() {
    Cluster& cluster = *idle_.back();
    idle_.pop_back();
    cluster.index = unflatten(order_[next_++], clusters_);
    cluster.barrier.begin(uint64_t{grid_.cluster_blocks()} * grid_.block_threads());
    for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
      const uint3 inside = unflatten(rank, grid_.cluster);
      const uint3 index = make_uint3(cluster.index.x * grid_.cluster.x + inside.x,
                                     cluster.index.y * grid_.cluster.y + inside.y,
                                     cluster.index.z * grid_.cluster.z + inside.z);
      cluster.blocks[rank]->start(grid_, &cluster, rank, index);
      now.active.push_back(cluster.blocks[rank]);
    }
  }

  void retire() {
    std::erase_if(now.active, [&](Block* block) {
      Cluster& cluster = block->cluster();
      if (!cluster.done()) return false;
      if (Observer* o = observer()) o->block_ends(block->linear());
      if (block->rank() == 0) idle_.push_back(&cluster);
      return true;
    });
  }

  // Throws when all that has happened for long is that threads looked whether they may go on.
  void watch_spinning(uint64_t changes) {
    if (now.changes != changes) {
      long_wait_ = still_ = 0;
      return;
    }
    if (now.released || now.elsewhere) still_ = 0;
    if (!now.gave_way) return;
    const int64_t weight = now.by_force ? std::max(1, settings().spin_rounds / 10) : 1;
    long_wait_ += weight;
    still_ += weight;
    if (still_ <= settings().spin_rounds && long_wait_ <= 100LL * settings().spin_rounds) return;
    for (Block* block : now.active) {
      const Thread* thread = block->done() ? nullptr : block->spinning();
      if (thread == nullptr) continue;
      const size_t waiting = (order_.size() - next_) * grid_.cluster_blocks();
      throw block->error(*thread,
                         "deadlock: spins and nothing changes; " +
                             std::to_string(now.active.size()) + " blocks are resident, " +
                             std::to_string(waiting) + " have not started",
                         thread->place());
    }
    first_live()->fail_deadlock();
  }

  const Block* first_live() const {
    for (const Block* block : now.active) {
      if (!block->done()) return block;
    }
    return now.active.front();
  }

  const Grid& grid_;
  dim3 clusters_;
  std::vector<unsigned> order_;
  size_t next_ = 0;
  std::vector<Cluster> in_flight_;
  std::vector<Cluster*> idle_;
  int64_t long_wait_ = 0, still_ = 0;
};

}  // namespace

void run(const Grid& grid) {
  if (now.grid != nullptr) throw Error(grid.kernel + ": launched from device code");
  const Traps traps;
  GridRun run_it(grid);
  run_it();
}

// ---------------------------------------------------------------- for the running thread

unsigned wait_for_barrier(unsigned id, unsigned count, bool aligned, bool vote, const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  thread.block->arrive_at_barrier(thread, id, count, true, aligned, vote, site);
  return thread.votes;
}

void arrive_at_barrier(unsigned id, unsigned count, const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  thread.block->arrive_at_barrier(thread, id, count, false, false, false, site);
}

uint64_t wait_for_warp(Collective collective, unsigned mask, uint64_t value, int source_lane,
                       const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  if (!(mask >> thread.lane() & 1)) {
    thread.block->fail(thread, "warp collective called by a lane outside its own mask", site);
  }
  thread.at(site);
  thread.collective = collective;
  thread.mask = mask;
  thread.wait = Wait::warp;
  Warp& warp = *now.warp;
  warp.value[thread.lane()] = value;
  warp.source[thread.lane()] = static_cast<uint8_t>(source_lane);
  thread.block->meet(thread);
  return warp.value[thread.lane()];
}

namespace {

std::vector<uint64_t> numbers_of(const std::vector<Block*>& blocks) {
  std::vector<uint64_t> numbers;
  for (const Block* block : blocks) {
    if (!block->done()) numbers.push_back(block->linear());
  }
  return numbers;
}

// One thread's arrival. With the last one everybody in `blocks` that waits goes on.
void arrive(SplitBarrier& barrier, bool by_sync, const std::vector<Block*>& blocks, Wait wait) {
  if (barrier.arrived == 0) barrier.whole = true;
  barrier.whole = barrier.whole && by_sync;
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  now.released = true;
  if (barrier.whole && barrier.expected == barrier.all) {
    if (Observer* o = observer()) o->blocks_released(numbers_of(blocks));
  }
  for (Block* block : blocks) block->wake(wait);
}

// Waits for the arrival that `token` stands for.
void wait_until_after(Thread& thread, SplitBarrier& barrier, uint64_t token, Wait wait,
                      const Site& site) {
  thread.at(site);
  if (barrier.generation == token) {
    thread.wait = wait;
    stop(thread);
  }
  if (Observer* o = observer()) o->waited(barrier.object(token));
}

// Arrives and always stops once, so that the order of threads stays the chosen one.
void arrive_and_wait(Thread& thread, SplitBarrier& barrier, const std::vector<Block*>& blocks,
                     Wait wait, const Site& site) {
  const uint64_t token = barrier.generation;
  thread.at(site);
  thread.wait = wait;
  if (Observer* o = observer()) o->arrives(barrier.object(token));
  arrive(barrier, true, blocks, wait);
  stop(thread);
  if (Observer* o = observer()) o->waited(barrier.object(token));
}

void check_cluster_arrival(const Thread& thread, const Site& site) {
  if (!thread.cluster_arrived) return;
  thread.block->fail(thread, "arrives twice at the cluster barrier without a wait", site);
}

void check_grid_arrival(const Thread& thread, const Site& site) {
  if (!now.grid->cooperative) {
    thread.block->fail(thread, "grid.sync() in a launch that is not cooperative", site);
  }
  if (thread.grid_arrived) {
    thread.block->fail(thread, "arrives twice at the grid barrier without a wait", site);
  }
  thread.block->check_grid_site(thread, site);
}

}  // namespace

void cluster_arrive(bool relaxed, const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  check_cluster_arrival(thread, site);
  SplitBarrier& barrier = thread.block->cluster().barrier;
  thread.cluster_arrived = true;
  thread.cluster_token = barrier.generation;
  if (Observer* o = observer(); o != nullptr && !relaxed) {
    o->arrives(barrier.object(barrier.generation));
  }
  arrive(barrier, false, thread.block->cluster().blocks, Wait::cluster);
}

void cluster_wait(const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  if (!thread.cluster_arrived) {
    thread.block->fail(thread, "waits at the cluster barrier without having arrived", site);
  }
  thread.cluster_arrived = false;
  wait_until_after(thread, thread.block->cluster().barrier, thread.cluster_token, Wait::cluster,
                   site);
}

void cluster_sync(const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  check_cluster_arrival(thread, site);
  Cluster& cluster = thread.block->cluster();
  arrive_and_wait(thread, cluster.barrier, cluster.blocks, Wait::cluster, site);
}

uint64_t grid_arrive(const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  check_grid_arrival(thread, site);
  thread.grid_arrived = true;
  thread.grid_token = now.barrier.generation;
  if (Observer* o = observer()) o->arrives(now.barrier.object(thread.grid_token));
  arrive(now.barrier, false, now.active, Wait::grid);
  return thread.grid_token;
}

void grid_wait(uint64_t token, const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  if (!thread.grid_arrived || token != thread.grid_token) {
    thread.block->fail(thread, "waits at the grid barrier without having arrived", site);
  }
  thread.grid_arrived = false;
  wait_until_after(thread, now.barrier, token, Wait::grid, site);
}

void grid_sync(const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  check_grid_arrival(thread, site);
  arrive_and_wait(thread, now.barrier, now.active, Wait::grid, site);
}

void give_way(const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  thread.at(site);
  thread.block->give_way(thread);
}

void give_way_by_force(const void* code) {
  const InRuntime in_runtime;
  now.by_force = true;
  now.thread->code = code;
  now.thread->block->give_way(*now.thread);
}

void saw(const void* address, uint64_t value, bool changed) {
  Thread& thread = current();
  if (changed) ++now.changes;
  if (thread.seen_address != address || thread.seen_value != value) {
    now.elsewhere = true;
    thread.seen_address = address;
    thread.seen_value = value;
  }
}

void* map_shared(const void* address, unsigned rank, const Site& site) {
  Thread& thread = current();
  Block& own = *thread.block;
  const std::vector<Block*>& blocks = own.cluster().blocks;
  if (rank >= blocks.size()) {
    own.fail(thread,
             "map_shared_rank: rank " + std::to_string(rank) + " in a cluster of " +
                 std::to_string(blocks.size()) + " blocks",
             site);
  }
  if (blocks[rank]->done()) {
    own.fail(thread,
             "map_shared_rank: block " + std::to_string(rank) +
                 " of the cluster has exited, and its shared memory with it",
             site);
  }
  Block& owner = *blocks[shared_rank(address, site)];
  const auto offset = static_cast<const unsigned char*>(address) - owner.shared().data();
  return blocks[rank]->shared().data() + offset;
}

unsigned shared_rank(const void* address, const Site& site) {
  Thread& thread = current();
  const std::vector<Block*>& blocks = thread.block->cluster().blocks;
  for (unsigned rank = 0; rank < blocks.size(); ++rank) {
    if (blocks[rank]->shared().holds(address)) return rank;
  }
  thread.block->fail(thread, "map_shared_rank: the address is not shared memory of this cluster",
                     site);
}

int describe_running(char* text, size_t size) {
  const uint3 block = now.block->index(), thread = now.thread->index;
  return std::snprintf(text, size, "%s: block (%u, %u, %u) thread (%u, %u, %u)\n",
                       now.grid->kernel.c_str(), block.x, block.y, block.z, thread.x, thread.y,
                       thread.z);
}

void fail_from_signal(const void* address, const void* code) {
  Thread& thread = *now.thread;
  now.fault_address = address;
  now.fault_code = code;
  now.faulted = &thread;
  now.thread = nullptr;
  now.turn = 0;
  thread.fiber.switch_to(Fiber::main(), true);
  std::abort();  // nobody switches back
}

}  // namespace cuda_emulator
