#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <numeric>

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim;
constinit thread_local dim3 gridDim;

namespace cuda_emulator {

Observer* the_observer = nullptr;

namespace {

thread_local Thread* running = nullptr;
thread_local std::string next_name;
thread_local std::mt19937_64 random_engine;

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

uint3 unflatten(uint64_t i, dim3 shape) {
  return make_uint3(static_cast<unsigned>(i % shape.x),
                    static_cast<unsigned>(i / shape.x % shape.y),
                    static_cast<unsigned>(i / shape.x / shape.y));
}

// Calls visit(i) for i in [0, count) in the chosen order.
template <class F>
void in_order(unsigned count, F&& visit) {
  switch (settings().order) {
    case Order::forward:
      for (unsigned i = 0; i < count; ++i) visit(i);
      break;
    case Order::reverse:
      for (unsigned i = count; i-- > 0;) visit(i);
      break;
    case Order::random: {
      std::vector<unsigned> order(count);
      std::iota(order.begin(), order.end(), 0u);
      std::shuffle(order.begin(), order.end(), random_engine);
      for (unsigned i : order) visit(i);
    }
  }
}

uint64_t flatten(uint3 i, dim3 shape) { return (uint64_t{i.z} * shape.y + i.y) * shape.x + i.x; }

std::unique_ptr<unsigned char[]> poisoned(size_t bytes) {
  auto memory = std::make_unique_for_overwrite<unsigned char[]>(bytes);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

Thread& current() {
  if (running == nullptr) throw Error("device code called outside a kernel");
  return *running;
}

void name_next_launch(const char* name) { next_name = name; }

std::string take_launch_name() {
  std::string name = next_name.empty() ? "kernel" : std::move(next_name);
  next_name.clear();
  return name;
}

void Block::start(const Grid& grid, uint3 index) {
  grid_ = &grid;
  index_ = index;
  threads_ = grid.threads.x * grid.threads.y * grid.threads.z;
  live_ = threads_;
  dynamic_shared_ = poisoned(grid.dynamic_shared);
  static_shared_.clear();
  static_shared_bytes_ = 0;
  failure_ = nullptr;
  while (pool_.size() < threads_) pool_.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < threads_; ++i) {
    Thread& thread = *pool_[i];
    thread.block = this;
    thread.index = unflatten(i, grid.threads);
    thread.linear = i;
    thread.done = false;
    thread.wait = Wait::nothing;
    thread.fiber.start(&Block::run_thread, &thread);
  }
  if (Observer* o = observer()) {
    o->block_starts(linear());
    if (grid.dynamic_shared > 0) {
      o->shared_memory(linear(), "dynamic shared memory", dynamic_shared_.get(),
                       grid.dynamic_shared);
    }
  }
}

void Block::run_thread(void* context) {
  auto& thread = *static_cast<Thread*>(context);
  try {
    thread.block->grid_->body();
  } catch (...) {
    thread.block->failure_ = std::current_exception();
  }
  thread.done = true;
}

bool Block::run_ready(unsigned first, unsigned lanes) {
  bool moved = false;
  in_order(lanes, [&](unsigned l) {
    Thread& thread = *pool_[first + l];
    if (thread.done || thread.wait != Wait::nothing) return;
    moved = true;
    running = &thread;
    threadIdx = thread.index;
    if (Observer* o = observer()) o->thread_runs(linear(), thread.linear);
    if (thread.fiber.resume()) --live_;
    if (Observer* o = observer()) o->thread_stops();
    running = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  });
  return moved;
}

bool Block::step() {
  blockIdx = index_;
  blockDim = grid_->threads;
  gridDim = grid_->blocks;
  bool moved = false;
  in_order((threads_ + 31) / 32, [&](unsigned warp) {
    const unsigned first = warp * 32;
    const unsigned lanes = std::min(32u, threads_ - first);
    // A warp runs as far ahead of the others as their barriers let it: so a missing one shows.
    // Under a random schedule it may also stop anywhere on the way.
    bool again = true;
    while (again) {
      const bool ran = run_ready(first, lanes);
      const bool released = release_warp(first, lanes);
      moved = moved || ran || released;
      again = released && (settings().order != Order::random || random_engine() % 4 != 0);
    }
  });
  if (release_barrier()) moved = true;
  return moved;
}

bool Block::release_warp(unsigned first, unsigned lanes) {
  bool released = false;
  unsigned alive = 0;
  for (unsigned l = 0; l < lanes; ++l) {
    if (!pool_[first + l]->done) alive |= 1u << l;
  }
  unsigned looked_at = 0;
  for (unsigned l = 0; l < lanes; ++l) {
    Thread& leader = *pool_[first + l];
    if (leader.done || leader.wait != Wait::warp || (looked_at >> l & 1)) continue;
    looked_at |= leader.mask;
    if ((leader.mask & ~alive) != 0) {
      fail(leader, "warp collective whose mask names a lane that has exited or does not exist",
           leader.site);
    }
    unsigned here = 0;
    for (unsigned k = 0; k < lanes; ++k) {
      Thread& thread = *pool_[first + k];
      if (!(leader.mask >> k & 1) || thread.done || thread.wait == Wait::nothing) continue;
      if (thread.wait == Wait::block) {
        fail(thread,
             "deadlock: waits at __syncthreads while its warp waits for it in a collective at " +
                 text(leader.site),
             thread.site);
      }
      if (thread.mask != leader.mask || thread.collective != leader.collective) {
        fail(thread,
             "lanes of one warp meet in different collectives or with different masks, "
             "the other at " +
                 text(leader.site),
             thread.site);
      }
      here |= 1u << k;
    }
    if (here != leader.mask) continue;
    exchange(first, here);
    released = true;
  }
  return released;
}

void Block::exchange(unsigned first, unsigned lanes) {
  // All values are read before any lane goes on: the next collective may overwrite them.
  uint64_t results[32] = {};
  uint64_t votes = 0;
  for (unsigned k = 0; k < 32; ++k) {
    if ((lanes >> k & 1) && pool_[first + k]->value != 0) votes |= uint64_t{1} << k;
  }
  for (unsigned k = 0; k < 32; ++k) {
    if (!(lanes >> k & 1)) continue;
    const Thread& thread = *pool_[first + k];
    if (thread.collective == Collective::shuffle) {
      const auto source = static_cast<unsigned>(thread.source_lane);
      if (source >= 32 || !(lanes >> source & 1)) {
        fail(thread, "shuffle from lane " + std::to_string(source) + ", which is outside the mask",
             thread.site);
      }
      results[k] = pool_[first + source]->value;
    } else if (thread.collective == Collective::ballot) {
      results[k] = votes;
    }
  }
  for (unsigned k = 0; k < 32; ++k) {
    if (!(lanes >> k & 1)) continue;
    pool_[first + k]->value = results[k];
    pool_[first + k]->wait = Wait::nothing;
  }
  if (Observer* o = observer()) {
    const Thread& any = *pool_[first + static_cast<unsigned>(__builtin_ctz(lanes))];
    o->warp_released(linear(), first / 32, lanes, any.collective == Collective::sync);
  }
}

bool Block::release_barrier() {
  const Thread* first = nullptr;
  unsigned waiting = 0;
  for (unsigned i = 0; i < threads_; ++i) {
    const Thread& thread = *pool_[i];
    if (thread.done || thread.wait != Wait::block) continue;
    ++waiting;
    if (first == nullptr) {
      first = &thread;
    } else if (thread.site.line() != first->site.line() ||
               thread.site.column() != first->site.column() ||
               std::strcmp(thread.site.file_name(), first->site.file_name()) != 0) {
      fail(thread,
           "divergent __syncthreads: thread " + text(first->index) + " waits at " +
               text(first->site),
           thread.site);
    }
  }
  if (waiting == 0 || waiting != live_) return false;
  if (live_ != threads_) {
    fail(*first,
         "divergent __syncthreads: " + std::to_string(threads_ - live_) +
             " threads of the block have exited",
         first->site);
  }
  for (unsigned i = 0; i < threads_; ++i) pool_[i]->wait = Wait::nothing;
  if (Observer* o = observer()) {
    std::vector<unsigned> all(threads_);
    std::iota(all.begin(), all.end(), 0u);
    o->barrier_released(linear(), all);
  }
  return true;
}

uint64_t Block::linear() const { return flatten(index_, grid_->blocks); }

void* Block::static_shared(const void* key, size_t bytes, const char* name) {
  for (StaticShared& variable : static_shared_) {
    if (variable.key == key) return variable.bytes.get();
  }
  static_shared_bytes_ += bytes;
  if (static_shared_bytes_ > settings().static_shared_limit ||
      static_shared_bytes_ + grid_->dynamic_shared > settings().shared_limit) {
    throw Error(grid_->kernel +
                ": too much shared memory: " + std::to_string(static_shared_bytes_) +
                " bytes static and " + std::to_string(grid_->dynamic_shared) + " dynamic");
  }
  static_shared_.push_back({key, poisoned(bytes)});
  if (Observer* o = observer()) {
    o->shared_memory(linear(), name, static_shared_.back().bytes.get(), bytes);
  }
  return static_shared_.back().bytes.get();
}

void Block::fail(const Thread& thread, const std::string& what, const Site& site) const {
  throw Error(grid_->kernel + ": block " + text(index_) + " thread " + text(thread.index) + ": " +
              what + ", at " + text(site));
}

void Block::fail_deadlock() const {
  for (unsigned i = 0; i < threads_; ++i) {
    const Thread& thread = *pool_[i];
    if (!thread.done) {
      fail(thread,
           std::string("deadlock: waits in ") +
               (thread.wait == Wait::block ? "__syncthreads" : "a warp collective") +
               " for threads that wait elsewhere",
           thread.site);
    }
  }
  throw Error(grid_->kernel + ": deadlock");
}

void run(const Grid& grid) {
  if (running != nullptr) throw Error(grid.kernel + ": launched from device code");
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  const uint64_t count = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  if (threads == 0 || threads > 1024 || grid.threads.z > 64) {
    throw Error(grid.kernel + ": bad block size " +
                text(make_uint3(grid.threads.x, grid.threads.y, grid.threads.z)) +
                ", expected 1 to 1024 threads");
  }
  if (count == 0 || grid.blocks.x > 0x7fffffffu || grid.blocks.y > 65535 || grid.blocks.z > 65535) {
    throw Error(grid.kernel + ": bad grid size " +
                text(make_uint3(grid.blocks.x, grid.blocks.y, grid.blocks.z)));
  }
  if (grid.dynamic_shared > settings().shared_limit) {
    throw Error(grid.kernel + ": too much shared memory: " + std::to_string(grid.dynamic_shared) +
                " bytes dynamic, the limit is " + std::to_string(settings().shared_limit));
  }
  random_engine.seed(settings().seed);
  struct Observed {  // grid_ends comes after an Error too
    explicit Observed(const GridEvent& event) {
      if (Observer* o = observer()) o->grid_starts(event);
    }
    ~Observed() {
      if (Observer* o = observer()) o->grid_ends();
    }
  } const observed({grid.kernel, count, static_cast<unsigned>(threads), 1, grid.stream});

  std::vector<unsigned> order;
  order.reserve(count);
  in_order(static_cast<unsigned>(count), [&](unsigned i) { order.push_back(i); });

  // Blocks keep their fibers' stacks from one launch to the next.
  static thread_local std::vector<std::unique_ptr<Block>> pool;
  const size_t resident =
      std::min<uint64_t>(count, static_cast<uint64_t>(std::max(1, settings().resident_blocks)));
  while (pool.size() < resident) pool.push_back(std::make_unique<Block>());

  size_t next = 0;
  std::vector<Block*> active;
  std::vector<Block*> idle;
  for (size_t i = 0; i < resident; ++i) idle.push_back(pool[i].get());
  try {
    while (next < count || !active.empty()) {
      while (next < count && !idle.empty()) {
        active.push_back(idle.back());
        idle.pop_back();
        active.back()->start(grid, unflatten(order[next++], grid.blocks));
      }
      bool moved = false;
      in_order(static_cast<unsigned>(active.size()), [&](unsigned i) {
        if (active[i]->step()) moved = true;
      });
      if (!moved) active.front()->fail_deadlock();
      std::erase_if(active, [&](Block* block) {
        if (!block->done()) return false;
        if (Observer* o = observer()) o->block_ends(block->linear());
        idle.push_back(block);
        return true;
      });
    }
  } catch (...) {
    running = nullptr;
    throw;
  }
}

void wait_for_block(const Site& site) {
  Thread& thread = current();
  thread.site = site;
  thread.wait = Wait::block;
  thread.fiber.suspend();
}

uint64_t wait_for_warp(Collective collective, unsigned mask, uint64_t value, int source_lane,
                       const Site& site) {
  Thread& thread = current();
  if (!(mask >> thread.lane() & 1)) {
    thread.block->fail(thread, "warp collective called by a lane outside its own mask", site);
  }
  thread.site = site;
  thread.collective = collective;
  thread.mask = mask;
  thread.value = value;
  thread.source_lane = source_lane;
  thread.wait = Wait::warp;
  thread.fiber.suspend();
  return thread.value;
}

}  // namespace cuda_emulator
