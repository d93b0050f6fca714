// nvcc's built-in atomics with a memory order and a scope (CUDA 12.8 and later), and the fence that
// goes with them. As there, the _n forms and compare-and-exchange take integers only.
#pragma once
#include "atomics.h"

#define __NV_ATOMIC_RELAXED 0
#define __NV_ATOMIC_CONSUME 1
#define __NV_ATOMIC_ACQUIRE 2
#define __NV_ATOMIC_RELEASE 3
#define __NV_ATOMIC_ACQ_REL 4
#define __NV_ATOMIC_SEQ_CST 5
#define __NV_THREAD_SCOPE_THREAD 0
#define __NV_THREAD_SCOPE_BLOCK 1
#define __NV_THREAD_SCOPE_CLUSTER 2
#define __NV_THREAD_SCOPE_DEVICE 3
#define __NV_THREAD_SCOPE_SYSTEM 4

namespace cuda_emulator {

constexpr Scope scope_of(int scope) {
  return scope <= __NV_THREAD_SCOPE_BLOCK     ? Scope::block
         : scope == __NV_THREAD_SCOPE_CLUSTER ? Scope::cluster
         : scope == __NV_THREAD_SCOPE_DEVICE  ? Scope::device
                                              : Scope::system;
}

}  // namespace cuda_emulator

template <class T>
EMULATOR_INLINE T __nv_atomic_load_n(const volatile T* address, int order,
                                     int scope = __NV_THREAD_SCOPE_SYSTEM,
                                     Site site = Site::current()) {
  static_assert(std::is_integral_v<T>);
  return cuda_emulator::load(address, cuda_emulator::order_of(order),
                             cuda_emulator::scope_of(scope), site);
}

template <class T>
EMULATOR_INLINE void __nv_atomic_load(const volatile T* address, T* result, int order,
                                      int scope = __NV_THREAD_SCOPE_SYSTEM,
                                      Site site = Site::current()) {
  *result = cuda_emulator::load(address, cuda_emulator::order_of(order),
                                cuda_emulator::scope_of(scope), site);
}

template <class T>
EMULATOR_INLINE void __nv_atomic_store_n(volatile T* address, std::type_identity_t<T> value,
                                         int order, int scope = __NV_THREAD_SCOPE_SYSTEM,
                                         Site site = Site::current()) {
  static_assert(std::is_integral_v<T>);
  cuda_emulator::store(address, value, cuda_emulator::order_of(order),
                       cuda_emulator::scope_of(scope), site);
}

template <class T>
EMULATOR_INLINE void __nv_atomic_store(volatile T* address, const T* value, int order,
                                       int scope = __NV_THREAD_SCOPE_SYSTEM,
                                       Site site = Site::current()) {
  cuda_emulator::store(address, *value, cuda_emulator::order_of(order),
                       cuda_emulator::scope_of(scope), site);
}

template <class T>
EMULATOR_INLINE T __nv_atomic_exchange_n(volatile T* address, std::type_identity_t<T> value,
                                         int order, int scope = __NV_THREAD_SCOPE_SYSTEM,
                                         Site site = Site::current()) {
  static_assert(std::is_integral_v<T>);
  return cuda_emulator::update(
      address, [value](T) { return value; }, cuda_emulator::order_of(order),
      cuda_emulator::scope_of(scope), site);
}

// A weak exchange does not fail without a reason here.
template <class T>
EMULATOR_INLINE bool __nv_atomic_compare_exchange_n(volatile T* address, T* expected,
                                                    std::type_identity_t<T> value, bool /*weak*/,
                                                    int success, int /*failure*/,
                                                    int scope = __NV_THREAD_SCOPE_SYSTEM,
                                                    Site site = Site::current()) {
  static_assert(std::is_integral_v<T>);
  const T before =
      cuda_emulator::compare_swap(address, *expected, value, cuda_emulator::order_of(success),
                                  cuda_emulator::scope_of(scope), site);
  const bool same = before == *expected;
  *expected = before;
  return same;
}

#define EMULATOR_NV_ATOMIC(name, expression)                                                     \
  template <class T>                                                                             \
  EMULATOR_INLINE T __nv_atomic_fetch_##name(volatile T* address, std::type_identity_t<T> value, \
                                             int order, int scope = __NV_THREAD_SCOPE_SYSTEM,    \
                                             Site site = Site::current()) {                      \
    return cuda_emulator::update(                                                                \
        address, [value](T before) -> T { return static_cast<T>(expression); },                  \
        cuda_emulator::order_of(order), cuda_emulator::scope_of(scope), site);                   \
  }                                                                                              \
  template <class T>                                                                             \
  EMULATOR_INLINE void __nv_atomic_##name(volatile T* address, std::type_identity_t<T> value,    \
                                          int order, int scope = __NV_THREAD_SCOPE_SYSTEM,       \
                                          Site site = Site::current()) {                         \
    __nv_atomic_fetch_##name(address, value, order, scope, site);                                \
  }

EMULATOR_NV_ATOMIC(add, before + value)
EMULATOR_NV_ATOMIC(sub, before - value)
EMULATOR_NV_ATOMIC(and, before& value)
EMULATOR_NV_ATOMIC(or, before | value)
EMULATOR_NV_ATOMIC(xor, before ^ value)
EMULATOR_NV_ATOMIC(min, std::min<T>(before, value))
EMULATOR_NV_ATOMIC(max, std::max<T>(before, value))
#undef EMULATOR_NV_ATOMIC

inline void __nv_atomic_thread_fence(int /*order*/, int scope = __NV_THREAD_SCOPE_SYSTEM,
                                     Site site = Site::current()) {
  cuda_emulator::fence(cuda_emulator::scope_of(scope), site);
}
