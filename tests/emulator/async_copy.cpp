#include "async_copy.h"

#include <cstring>
#include <string>

#include "scheduler.h"
#include "trap.h"

namespace cuda_emulator {
namespace {

uint64_t next_id = 0;

}  // namespace

void AsyncCopies::clear() {
  copies_.clear();
  commits_ = 0;
}

void AsyncCopies::issue(void* to, const void* from, size_t bytes, size_t zeros, const void* code) {
  std::memset(to, 0xff, bytes + zeros);
  copies_.push_back({++next_id, commits_, to, from, bytes, zeros});
  if (Observer* o = observer()) o->copy_issued({next_id, to, from, bytes, zeros, code});
}

void AsyncCopies::wait_prior(size_t prior) {
  size_t kept = 0;
  for (const Copy& copy : copies_) {
    if (copy.batch + prior >= commits_) {
      copies_[kept++] = copy;
      continue;
    }
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
    if (Observer* o = observer()) o->copy_completed(copy.id, nullptr);
  }
  copies_.resize(kept);
}

__attribute__((noinline)) void async_copy(void* to, const void* from, size_t size, size_t zeros,
                                          const Site& site) {
  const InRuntime in_runtime;
  Thread& thread = current();
  Block& block = *thread.block;
  const auto multiple = [&](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % size == 0;
  };
  if (size != 4 && size != 8 && size != 16) {
    block.fail(thread, "asynchronous copy of " + std::to_string(size) + " bytes, expected 4, 8, 16",
               site);
  }
  if (zeros > size) {
    block.fail(thread,
               "asynchronous copy of " + std::to_string(size) + " bytes with " +
                   std::to_string(zeros) + " of them zero",
               site);
  }
  if (!multiple(to) || !multiple(from)) {
    block.fail(thread,
               std::string("asynchronous copy: ") + (multiple(to) ? "source" : "destination") +
                   " is not on a boundary of " + std::to_string(size) + " bytes",
               site);
  }
  if (!block.shared().holds(to)) {
    block.fail(thread, "asynchronous copy to memory that is not shared memory of this block", site);
  }
  if (block.shared().holds(from)) {
    block.fail(thread, "asynchronous copy from shared memory, expected global memory", site);
  }
  thread.copies.issue(to, from, size - zeros, zeros, __builtin_return_address(0));
}

void async_commit() { current().copies.commit(); }

void async_wait_prior(size_t prior, const Site& site) {
  const InRuntime in_runtime;
  give_way(site);
  current().copies.wait_prior(prior);
}

}  // namespace cuda_emulator
