#include "atomics.h"

#include <string>

#include "trap.h"

namespace cuda_emulator {

__attribute__((noinline)) uint64_t modify(void* address, size_t bytes, bool reads, bool writes,
                                          Modify f, const void* context, MemoryOrder order,
                                          Scope scope, const Site& site) {
  const InRuntime in_runtime;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    Thread& thread = current();
    thread.block->fail(
        thread, "atomic on memory that is not on a boundary of " + std::to_string(bytes) + " bytes",
        site);
  }
  give_way(site);
  uint64_t before = 0;
  std::memcpy(&before, address, bytes);
  uint64_t after = before;
  const bool written = f(after, context);
  if (written) std::memcpy(address, &after, bytes);
  saw(address, before, after != before);
  if (Observer* o = observer()) {
    o->atomic(
        {address, bytes, reads, writes && written, order, scope, __builtin_return_address(0)});
  }
  return before;
}

void fence(Scope scope, const Site& site) {
  const InRuntime in_runtime;
  give_way(site);
  if (Observer* o = observer()) o->fence(scope);
}

}  // namespace cuda_emulator
