// Atomics, fences and __nanosleep, in CUDA's spelling. Threads take turns on one host thread, so
// each operation is atomic and all are ordered; what order and scope they promise goes to the
// observer. A thread gives way before each of them: other threads' steps may come between.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace cuda_emulator {

// Inlined, so that the observer finds the kernel's line where the call returns to.
#define EMULATOR_INLINE inline __attribute__((always_inline))

// Loads `bytes` at `address`, stores what `f` makes of them unless it says no, and returns what was
// there. Checks alignment.
using Modify = bool (*)(uint64_t& bits, const void* context);
uint64_t modify(void* address, size_t bytes, bool reads, bool writes, Modify f, const void* context,
                MemoryOrder order, Scope scope, const Site& site);
void fence(Scope scope, const Site& site);

template <class To, class From>
To same_bits(const From& from) {
  To to{};
  std::memcpy(static_cast<void*>(&to), &from,
              sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

// *address = f(*address); returns what was there.
template <class T, class F>
EMULATOR_INLINE T update(volatile T* address, const F& f, MemoryOrder order, Scope scope,
                         const Site& site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const Modify apply = [](uint64_t& bits, const void* context) {
    bits =
        same_bits<uint64_t>(static_cast<T>((*static_cast<const F*>(context))(same_bits<T>(bits))));
    return true;
  };
  return same_bits<T>(
      modify(const_cast<T*>(address), sizeof(T), true, true, apply, &f, order, scope, site));
}

template <class T>
EMULATOR_INLINE T load(const volatile T* address, MemoryOrder order, Scope scope,
                       const Site& site) {
  const Modify keep = [](uint64_t&, const void*) { return false; };
  return same_bits<T>(
      modify(const_cast<T*>(address), sizeof(T), true, false, keep, nullptr, order, scope, site));
}

template <class T>
EMULATOR_INLINE void store(volatile T* address, T value, MemoryOrder order, Scope scope,
                           const Site& site) {
  const Modify put = [](uint64_t& bits, const void* context) {
    bits = same_bits<uint64_t>(*static_cast<const T*>(context));
    return true;
  };
  modify(const_cast<T*>(address), sizeof(T), false, true, put, &value, order, scope, site);
}

// Stores `value` where `expected` is, bit for bit; returns what was there.
template <class T>
EMULATOR_INLINE T compare_swap(volatile T* address, T expected, T value, MemoryOrder order,
                               Scope scope, const Site& site) {
  const T pair[2] = {expected, value};
  const Modify swap = [](uint64_t& bits, const void* context) {
    const T* both = static_cast<const T*>(context);
    if (bits != same_bits<uint64_t>(both[0])) return false;
    bits = same_bits<uint64_t>(both[1]);
    return true;
  };
  return same_bits<T>(
      modify(const_cast<T*>(address), sizeof(T), true, true, swap, pair, order, scope, site));
}

constexpr MemoryOrder order_of(int order) {
  // consume, which CUDA gives the number 1, is acquire
  return order == 0   ? MemoryOrder::relaxed
         : order <= 2 ? MemoryOrder::acquire
         : order == 3 ? MemoryOrder::release
         : order == 4 ? MemoryOrder::acq_rel
                      : MemoryOrder::seq_cst;
}

}  // namespace cuda_emulator

using cuda_emulator::Site;

// The three forms of each operation: device scope, _block and _system.
#define EMULATOR_ATOMIC(name, T, expression)                                          \
  EMULATOR_INLINE T name(T* address, T value, Site site = Site::current()) {          \
    return cuda_emulator::update(                                                     \
        address, [value](T before) -> T { return expression; },                       \
        cuda_emulator::MemoryOrder::relaxed, cuda_emulator::Scope::device, site);     \
  }                                                                                   \
  EMULATOR_INLINE T name##_block(T* address, T value, Site site = Site::current()) {  \
    return cuda_emulator::update(                                                     \
        address, [value](T before) -> T { return expression; },                       \
        cuda_emulator::MemoryOrder::relaxed, cuda_emulator::Scope::block, site);      \
  }                                                                                   \
  EMULATOR_INLINE T name##_system(T* address, T value, Site site = Site::current()) { \
    return cuda_emulator::update(                                                     \
        address, [value](T before) -> T { return expression; },                       \
        cuda_emulator::MemoryOrder::relaxed, cuda_emulator::Scope::system, site);     \
  }
// Without the scoped forms.
#define EMULATOR_ATOMIC_ON_DEVICE(name, T, expression)                            \
  EMULATOR_INLINE T name(T* address, T value, Site site = Site::current()) {      \
    return cuda_emulator::update(                                                 \
        address, [value](T before) -> T { return expression; },                   \
        cuda_emulator::MemoryOrder::relaxed, cuda_emulator::Scope::device, site); \
  }
#define EMULATOR_ATOMIC_CAS(T)                                                                     \
  EMULATOR_INLINE T atomicCAS(T* address, T compare, T value, Site site = Site::current()) {       \
    return cuda_emulator::compare_swap(address, compare, value,                                    \
                                       cuda_emulator::MemoryOrder::relaxed,                        \
                                       cuda_emulator::Scope::device, site);                        \
  }                                                                                                \
  EMULATOR_INLINE T atomicCAS_block(T* address, T compare, T value, Site site = Site::current()) { \
    return cuda_emulator::compare_swap(address, compare, value,                                    \
                                       cuda_emulator::MemoryOrder::relaxed,                        \
                                       cuda_emulator::Scope::block, site);                         \
  }                                                                                                \
  EMULATOR_INLINE T atomicCAS_system(T* address, T compare, T value,                               \
                                     Site site = Site::current()) {                                \
    return cuda_emulator::compare_swap(address, compare, value,                                    \
                                       cuda_emulator::MemoryOrder::relaxed,                        \
                                       cuda_emulator::Scope::system, site);                        \
  }
#define EMULATOR_ATOMIC_LOGIC(T)                                     \
  EMULATOR_ATOMIC(atomicExch, T, (static_cast<void>(before), value)) \
  EMULATOR_ATOMIC(atomicMin, T, std::min(before, value))             \
  EMULATOR_ATOMIC(atomicMax, T, std::max(before, value))             \
  EMULATOR_ATOMIC(atomicAnd, T, before& value)                       \
  EMULATOR_ATOMIC(atomicOr, T, before | value)                       \
  EMULATOR_ATOMIC(atomicXor, T, before ^ value)

// Integers wrap, as on the device.
EMULATOR_ATOMIC(atomicAdd, int,
                static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value)))
EMULATOR_ATOMIC(atomicAdd, unsigned, before + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, before + value)
EMULATOR_ATOMIC(atomicAdd, float, before + value)
EMULATOR_ATOMIC(atomicAdd, double, before + value)
EMULATOR_ATOMIC(atomicSub, int,
                static_cast<int>(static_cast<unsigned>(before) - static_cast<unsigned>(value)))
EMULATOR_ATOMIC(atomicSub, unsigned, before - value)
EMULATOR_ATOMIC_LOGIC(int)
EMULATOR_ATOMIC_LOGIC(unsigned)
EMULATOR_ATOMIC_LOGIC(unsigned long long)
EMULATOR_ATOMIC(atomicMin, long long, std::min(before, value))
EMULATOR_ATOMIC(atomicMax, long long, std::max(before, value))
EMULATOR_ATOMIC(atomicAnd, long long, before& value)
EMULATOR_ATOMIC(atomicOr, long long, before | value)
EMULATOR_ATOMIC(atomicXor, long long, before ^ value)
EMULATOR_ATOMIC(atomicExch, float, (static_cast<void>(before), value))
EMULATOR_ATOMIC(atomicInc, unsigned, before >= value ? 0 : before + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, before == 0 || before > value ? value : before - 1)
EMULATOR_ATOMIC_CAS(int)
EMULATOR_ATOMIC_CAS(unsigned)
EMULATOR_ATOMIC_CAS(unsigned long long)
EMULATOR_ATOMIC_CAS(unsigned short)
EMULATOR_ATOMIC_ON_DEVICE(atomicAdd, __half,
                          __float2half_rn(__half2float(before) + __half2float(value)))
EMULATOR_ATOMIC_ON_DEVICE(atomicAdd, __half2,
                          __halves2half2(__float2half_rn(__low2float(before) + __low2float(value)),
                                         __float2half_rn(__high2float(before) +
                                                         __high2float(value))))
EMULATOR_ATOMIC_ON_DEVICE(atomicAdd, __nv_bfloat16,
                          __float2bfloat16_rn(__bfloat162float(before) + __bfloat162float(value)))
EMULATOR_ATOMIC_ON_DEVICE(atomicAdd, __nv_bfloat162,
                          __floats2bfloat162_rn(__low2float(before) + __low2float(value),
                                                __high2float(before) + __high2float(value)))

#undef EMULATOR_ATOMIC
#undef EMULATOR_ATOMIC_ON_DEVICE
#undef EMULATOR_ATOMIC_CAS
#undef EMULATOR_ATOMIC_LOGIC

inline void __threadfence(Site site = Site::current()) {
  cuda_emulator::fence(cuda_emulator::Scope::device, site);
}
inline void __threadfence_block(Site site = Site::current()) {
  cuda_emulator::fence(cuda_emulator::Scope::block, site);
}
inline void __threadfence_system(Site site = Site::current()) {
  cuda_emulator::fence(cuda_emulator::Scope::system, site);
}
inline void __nanosleep(unsigned, Site site = Site::current()) { cuda_emulator::give_way(site); }
