// What g++ calls in code compiled with -fsanitize=thread, in place of the thread sanitizer's
// runtime: every load and store with its address, size and return address, whatever helper the
// source goes through. A 16-byte load is one call where structs are not taken apart
// (-fno-tree-sra).
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "recorder.h"
#include "scheduler.h"
#include "trap.h"

using namespace cuda_emulator;

#define CODE __builtin_return_address(0)

namespace {

// The recorder must not be interrupted half way: another thread would come into it. So each of
// these is InRuntime, and a thread that waits by volatile reads, nearly all of whose time goes by
// in here, gives way before one: after it, the value read would be newer than what was recorded.
void give_way_if_overdue(const void* code) {
  if (!InRuntime::overdue || !in_kernel()) return;
  InRuntime::overdue = false;
  give_way_by_force(code);
}

void touch(const void* data, size_t bytes, bool reads, bool writes, const void* code) {
  if (the_recorder == nullptr) return;
  const InRuntime in_runtime;
  the_recorder->touch(data, bytes, reads, writes, code);
}

// A range is walked as its widest accesses: 16 bytes each.
void touch_range(const void* data, size_t bytes, bool write, const void* code) {
  if (the_recorder == nullptr) return;
  const InRuntime in_runtime;
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const size_t to_boundary = 16 - reinterpret_cast<uintptr_t>(at) % 16;
    const size_t now = bytes < to_boundary ? bytes : to_boundary;
    the_recorder->touch(at, now, !write, write, code);
    at += now;
    bytes -= now;
  }
}

// A volatile access is a relaxed atomic that any thread may take part in.
void touch_volatile(const void* data, size_t bytes, bool write, const void* code) {
  if (the_recorder == nullptr) return;
  const InRuntime in_runtime;
  InRuntime::told_of_volatile = true;
  give_way_if_overdue(code);
  the_recorder->touch_atomic(
      {data, bytes, !write, write, MemoryOrder::relaxed, Scope::system, code});
}

MemoryOrder order_of(int order) {
  switch (order) {
    case __ATOMIC_RELAXED:
      return MemoryOrder::relaxed;
    case __ATOMIC_CONSUME:
    case __ATOMIC_ACQUIRE:
      return MemoryOrder::acquire;
    case __ATOMIC_RELEASE:
      return MemoryOrder::release;
    case __ATOMIC_ACQ_REL:
      return MemoryOrder::acq_rel;
    default:
      return MemoryOrder::seq_cst;
  }
}

// The host language's atomics know no scope: they reach everywhere.
void touch_atomic(const volatile void* data, size_t bytes, bool reads, bool writes, int order,
                  const void* code) {
  if (the_recorder == nullptr) return;
  const InRuntime in_runtime;
  the_recorder->touch_atomic(
      {const_cast<const void*>(data), bytes, reads, writes, order_of(order), Scope::system, code});
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void** at, void*) { touch(at, sizeof *at, false, true, CODE); }
void __tsan_vptr_read(void** at) { touch(at, sizeof *at, true, false, CODE); }
void __tsan_read_range(void* data, size_t bytes) { touch_range(data, bytes, false, CODE); }
void __tsan_write_range(void* data, size_t bytes) { touch_range(data, bytes, true, CODE); }

#define PLAIN(bytes)                                                                         \
  void __tsan_read##bytes(void* data) { touch(data, bytes, true, false, CODE); }             \
  void __tsan_write##bytes(void* data) { touch(data, bytes, false, true, CODE); }            \
  void __tsan_volatile_read##bytes(void* data) { touch_volatile(data, bytes, false, CODE); } \
  void __tsan_volatile_write##bytes(void* data) { touch_volatile(data, bytes, true, CODE); }
#define UNALIGNED(bytes)                                                                    \
  void __tsan_unaligned_read##bytes(void* data) { touch(data, bytes, true, false, CODE); }  \
  void __tsan_unaligned_write##bytes(void* data) { touch(data, bytes, false, true, CODE); } \
  void __tsan_unaligned_volatile_read##bytes(void* data) {                                  \
    touch_volatile(data, bytes, false, CODE);                                               \
  }                                                                                         \
  void __tsan_unaligned_volatile_write##bytes(void* data) {                                 \
    touch_volatile(data, bytes, true, CODE);                                                \
  }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
#undef PLAIN
#undef UNALIGNED

void __tsan_atomic_thread_fence(int) {
  if (the_recorder == nullptr) return;
  const InRuntime in_runtime;
  the_recorder->fence(Scope::system);
}
void __tsan_atomic_signal_fence(int) {}

#define UPDATE(bits, name, builtin)                                                                \
  uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* data, uint##bits##_t value, \
                                              int order) {                                         \
    touch_atomic(data, bits / 8, true, true, order, CODE);                                         \
    return builtin(data, value, __ATOMIC_SEQ_CST);                                                 \
  }
#define COMPARE(bits, name, weak)                                                                \
  bool __tsan_atomic##bits##_compare_exchange_##name(volatile uint##bits##_t* data,              \
                                                     uint##bits##_t* expected,                   \
                                                     uint##bits##_t value, int order, int) {     \
    const bool done = __atomic_compare_exchange_n(data, expected, value, weak, __ATOMIC_SEQ_CST, \
                                                  __ATOMIC_SEQ_CST);                             \
    touch_atomic(data, bits / 8, true, done, order, CODE);                                       \
    return done;                                                                                 \
  }
#define ATOMIC(bits)                                                                          \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* data, int order) { \
    touch_atomic(data, bits / 8, true, false, order, CODE);                                   \
    return __atomic_load_n(data, __ATOMIC_SEQ_CST);                                           \
  }                                                                                           \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* data, uint##bits##_t value,       \
                                   int order) {                                               \
    touch_atomic(data, bits / 8, false, true, order, CODE);                                   \
    __atomic_store_n(data, value, __ATOMIC_SEQ_CST);                                          \
  }                                                                                           \
  UPDATE(bits, exchange, __atomic_exchange_n)                                                 \
  UPDATE(bits, fetch_add, __atomic_fetch_add)                                                 \
  UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                                 \
  UPDATE(bits, fetch_and, __atomic_fetch_and)                                                 \
  UPDATE(bits, fetch_or, __atomic_fetch_or)                                                   \
  UPDATE(bits, fetch_xor, __atomic_fetch_xor)                                                 \
  UPDATE(bits, fetch_nand, __atomic_fetch_nand)                                               \
  COMPARE(bits, strong, false)                                                                \
  COMPARE(bits, weak, true)
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
#undef ATOMIC
#undef COMPARE
#undef UPDATE

// Under these names instrument_prefix.h calls them.
__attribute__((visibility("default"))) void* emulator_memcpy(void* to, const void* from,
                                                             size_t bytes) {
  touch_range(from, bytes, false, CODE);
  touch_range(to, bytes, true, CODE);
  return std::memcpy(to, from, bytes);
}

__attribute__((visibility("default"))) void* emulator_memmove(void* to, const void* from,
                                                              size_t bytes) {
  touch_range(from, bytes, false, CODE);
  touch_range(to, bytes, true, CODE);
  return std::memmove(to, from, bytes);
}

__attribute__((visibility("default"))) void* emulator_memset(void* to, int value, size_t bytes) {
  touch_range(to, bytes, true, CODE);
  return std::memset(to, value, bytes);
}

}  // extern "C"
