// Warp collectives and block barriers, in CUDA's spelling.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace cuda_emulator {

inline int lane() { return static_cast<int>(current().lane()); }

template <class T>
T shuffle(unsigned mask, T value, int source_lane, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = wait_for_warp(Collective::shuffle, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

inline unsigned reduce(Collective collective, unsigned mask, unsigned value, const Site& site) {
  return static_cast<unsigned>(wait_for_warp(collective, mask, value, 0, site));
}

}  // namespace cuda_emulator

using cuda_emulator::Site;

inline void __syncthreads(Site site = Site::current()) {
  cuda_emulator::wait_for_barrier(0, 0, true, false, site);
}
inline int __syncthreads_count(int predicate, Site site = Site::current()) {
  return static_cast<int>(cuda_emulator::wait_for_barrier(0, 0, true, predicate != 0, site));
}
inline int __syncthreads_or(int predicate, Site site = Site::current()) {
  return cuda_emulator::wait_for_barrier(0, 0, true, predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, Site site = Site::current()) {
  return cuda_emulator::wait_for_barrier(0, 0, true, predicate == 0, site) == 0;
}
inline void __barrier_sync(unsigned id, Site site = Site::current()) {
  cuda_emulator::wait_for_barrier(id, 0, false, false, site);
}
inline void __barrier_sync_count(unsigned id, unsigned count, Site site = Site::current()) {
  cuda_emulator::wait_for_barrier(id, count, false, false, site);
}

// barrier.arrive of PTX, which CUDA has no name for: those who wait there see what was done before.
inline void __barrier_arrive_count(unsigned id, unsigned count, Site site = Site::current()) {
  cuda_emulator::arrive_at_barrier(id, count, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::current()) {
  cuda_emulator::wait_for_warp(cuda_emulator::Collective::sync, mask, 0, 0, site);
}

// The lanes that have not exited: on a device a subset of these, whichever run together.
inline unsigned __activemask() { return cuda_emulator::live_lanes(); }

// `width` cuts the warp into segments; a source outside the segment leaves the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Site site = Site::current()) {
  const int segment = cuda_emulator::lane() & ~(width - 1);
  return cuda_emulator::shuffle(mask, value, segment + (source & (width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane + static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return cuda_emulator::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, inside ? lane - static_cast<int>(delta) : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  Site site = Site::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane ^ lane_mask;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return cuda_emulator::shuffle(mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<unsigned>(cuda_emulator::wait_for_warp(cuda_emulator::Collective::ballot, mask,
                                                            predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// Values are the same when their bits are.
template <class T>
unsigned __match_any_sync(unsigned mask, T value, Site site = Site::current()) {
  return static_cast<unsigned>(cuda_emulator::wait_for_warp(
      cuda_emulator::Collective::match_any, mask, cuda_emulator::bits_of(value), 0, site));
}

template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, Site site = Site::current()) {
  const auto same = static_cast<unsigned>(cuda_emulator::wait_for_warp(
      cuda_emulator::Collective::match_all, mask, cuda_emulator::bits_of(value), 0, site));
  *all = same != 0;
  return same;
}

// compute_80 and above.
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::add, mask, value, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::min_unsigned, mask, value, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::max_unsigned, mask, value, site);
}
inline int __reduce_add_sync(unsigned mask, int value, Site site = Site::current()) {
  return static_cast<int>(cuda_emulator::reduce(cuda_emulator::Collective::add, mask,
                                                static_cast<unsigned>(value), site));
}
inline int __reduce_min_sync(unsigned mask, int value, Site site = Site::current()) {
  return static_cast<int>(cuda_emulator::reduce(cuda_emulator::Collective::min_signed, mask,
                                                static_cast<unsigned>(value), site));
}
inline int __reduce_max_sync(unsigned mask, int value, Site site = Site::current()) {
  return static_cast<int>(cuda_emulator::reduce(cuda_emulator::Collective::max_signed, mask,
                                                static_cast<unsigned>(value), site));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::bit_and, mask, value, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::bit_or, mask, value, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, Site site = Site::current()) {
  return cuda_emulator::reduce(cuda_emulator::Collective::bit_xor, mask, value, site);
}
