// Batch norm that reads x once: the blocks that share a set (a ghost batch's channel, or its tile
// of channels) keep a part of it each in shared memory, tell each other their sums, and go on with
// what they have kept.
//
//   one block    the set fits it
//   a cluster    2, 4 or 8 blocks, which read each other's shared memory
//   a team       any number of blocks, all resident (a cooperative launch), that write their sums
//                to the workspace and count arrivals there, for each set anew
//
// A thread keeps what it has loaded itself: unit i of a tensor lies with those of its neighbours,
// and nobody else looks at it. Units beyond those that fit are read again, back to front, so that
// what was read last is still in the L2 cache.
//
//   shared memory:  tensor 0 [kept][kThreads] units, tensor 1 …
//
// Parts depend on the shape and the device: the same bits on every device of one kind.
#pragma once
#include "kernels/cuda/batch_norm.cuh"

namespace batchops::cuda {

constexpr int kMostResidentTile = 128;  // channels of a set
// Bytes of a part from which it is worth being shared out further.
constexpr int64_t kSmallPart = 24 * 1024;
constexpr int64_t kSector = 32;
constexpr int64_t kLine = 128;
constexpr int64_t kTileBytes = 256;  // channels_last: of a row

// Whether anything is kept at all: BATCHOPS_CUDA_RESIDENT=0 in the environment of the process says
// no, for timing the one against the other.
extern bool keep_on_chip;
// Multiprocessors that teams, which all wait until the last block has come, leave to kernels that
// run beside them (a reduction of gradients): BATCHOPS_CUDA_SM_MARGIN, 0 without it.
extern int spared_multiprocessors;

// For measuring: channels_last in teams; channels_first in a flow of sets.
extern bool teams_of_rows;
extern bool flows;
extern bool together;  // … by planes of several channels, where a plane is small

// Blocks on a multiprocessor where sets flow: up to 64 and 80 registers a thread.
constexpr int kFlowing = 4;
constexpr int kPlanesFlowing = 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMorePlanes = 0;
#else
constexpr int kMorePlanes = kPlanesFlowing - kLeastResident;
#endif
// By launch bounds. Code for others than sm_90 takes some registers more.
template <class Act>
constexpr int blocks_where_flowing(bool planes, bool crowded = false) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  if (!planes) return kLeastResident;
#else
  if (!planes) return kFlowing;
#endif
  if (kAnyActivation<Act> && crowded) return 1;
  return kLeastResident + (crowded || kAnyActivation<Act> ? 0 : kMorePlanes);
}
constexpr int64_t kPlanesBytes = 4096;  // half of what PlanesChunk and its mask take

inline int for_teams(const Device& device) {
  return clamp(device.multiprocessors - spared_multiprocessors, 1, device.multiprocessors);
}

// What a kernel keeps of the tensors.
struct Keeping {
  int tensors;
  int size;  // of an element
  int sums;  // bytes of a channel's sums
  bool mask;
};

// How a tensor is held on the chip.
struct Residency {
  bool possible = false;
  int parts = 1;         // of a set
  bool cluster = false;  // they are one
  bool flow = false;     // a block has two sets at once
  bool planes = false;   // of which are taken together, `tile` of them; `chunk` is in samples
  int64_t sets = 0;
  int tile = 1;       // channels of a set
  int64_t chunk = 0;  // of a part: elements (channels_first), rows (channels_last)
  int64_t bytes = 0;  // dynamic shared memory of a block

  bool team() const { return flow || (parts > 1 && !cluster); }
  int even(int size) const { return static_cast<int>(kSector) / size; }
};

namespace residency {

// Static shared memory of the kernels: sums of 256 threads by channel, and a set's coefficients.
inline int64_t static_bytes(const Plan& plan, const Keeping& keeping) {
  if (!plan.channels_last()) return 1024;
  const int64_t widest = 16 / keeping.size;
  const bool table = keeping.size == 2 && keeping.tensors > 1;  // the backward's
  return 2 * widest * kThreads * 4 + kMostResidentTile * 48 +
         (table ? static_cast<int64_t>(sizeof(AffineTable)) : 0) + 1024;
}

// What is left for tensors with so many blocks on a multiprocessor.
inline int64_t room(const Plan& plan, const Keeping& keeping, const Device& device, int blocks) {
  constexpr int64_t kReserved = 1024;  // by the driver, of each block
  const int64_t share = device.shared_of_all / blocks - kReserved;
  return (share < device.shared ? share : device.shared) - static_bytes(plan, keeping);
}

// Elements of a channel, or rows, in a ghost batch.
inline int64_t length(const Plan& plan, const Keeping& keeping) {
  const bool padded = keeping.mask && !plan.channels_last();
  return plan.most_samples() * (padded ? round_up<int64_t>(plan.HxW, 8) : plan.HxW);
}

inline ChunkGrid grid(const Plan& plan, const Keeping& keeping, const Residency& found, int width) {
  ChunkGrid made(plan, width, found.chunk, found.parts, plan.ghosts * found.parts, found.tile,
                 found.even(keeping.size), keeping.mask);
  if (found.planes) made.take_together(plan, width, found.tile, found.chunk);
  return made;
}

// Units that a thread has of a part.
inline int64_t units(const Plan& plan, const Keeping& keeping, const Residency& found, int width) {
  if (!plan.channels_last() && !found.planes) {
    return ceil_divide<int64_t>(found.chunk, int64_t{kThreads} * width);
  }
  return ceil_divide<int64_t>(found.chunk, grid(plan, keeping, found, width).tiles.rows_at_once);
}

inline int64_t unit_bytes(const Keeping& keeping, int width) {
  return int64_t{kThreads} * width * keeping.size * keeping.tensors;
}

// Cuts sets into so many parts.
inline void cut(const Plan& plan, const Keeping& keeping, Residency& found, int64_t parts) {
  found.parts = static_cast<int>(parts);
  const int64_t part = ceil_divide(length(plan, keeping), parts);
  found.chunk = plan.channels_last() ? part : round_up<int64_t>(part, 2048);
  found.bytes = 0;
  for (int width = 16 / keeping.size;; width = width > 4 ? 4 : 1) {
    if (plan.row() % width != 0) continue;  // not walked so
    const int64_t bytes = units(plan, keeping, found, width) * unit_bytes(keeping, width);
    if (bytes > found.bytes) found.bytes = bytes;
    if (width == 1) break;
  }
}

// The fewest parts of which each fits `room`; 0 if that takes more than `most`.
inline int64_t parts_for(const Plan& plan, const Keeping& keeping, Residency& found, int64_t room,
                         int64_t most) {
  if (room <= 0) return 0;
  cut(plan, keeping, found, 1);
  for (int64_t parts = ceil_divide(found.bytes, room); parts <= most; ++parts) {
    cut(plan, keeping, found, parts);
    if (found.bytes <= room) return parts;
  }
  return 0;
}

// A set flows through the chip: while a team's blocks wait for each other's sums of one, they sum
// over the next. So there are two buffers, and many small blocks. What does not fit a buffer is
// read again from the L2 cache.
inline bool flow(const Plan& plan, const Keeping& keeping, const Device& device, bool planes,
                 Residency& found) {
  constexpr int64_t kLeastPart = 8 * 1024;
  constexpr int64_t kLongest = 131072;  // elements: longer parts would want more careful sums
  const int64_t widest = 16 / keeping.size;
  found.tile = planes ? planes_together(plan, static_cast<int>(widest)) : 1;
  found.flow = true;
  found.planes = planes;
  if (planes && (found.tile < 2 || !together)) return false;
  found.sets = plan.columns() / found.tile;
  const int64_t length_of_set = planes ? plan.most_samples() : length(plan, keeping);
  const int64_t row = planes ? found.tile * plan.HxW : 1;  // elements of what is counted
  const int64_t grain = planes ? 1 : 256;                  // a chunk is a multiple of this
  const int64_t at_once = planes ? kThreads / (row / widest) : kThreads * widest;
  const int64_t bytes_at_once = unit_bytes(keeping, static_cast<int>(widest));
  int blocks = planes ? kPlanesFlowing : kFlowing;
  int64_t buffer = 0;
  for (;; blocks /= 2) {
    if (blocks == 0) return false;
    buffer = room(plan, keeping, device, blocks) / 2 - (planes ? kPlanesBytes : 0);
    if (buffer >= bytes_at_once) break;
  }
  const int64_t resident = int64_t{blocks} * device.multiprocessors;
  const int64_t fits = buffer / bytes_at_once * at_once;
  const int64_t bytes_of_set = length_of_set * row * keeping.size * keeping.tensors;
  int64_t parts = clamp<int64_t>(ceil_divide(length_of_set, fits), 1, resident);
  // As many sets in each turn, and no block that they leave over.
  const int64_t turns = ceil_divide(found.sets, resident / parts);
  const int64_t share = resident / ceil_divide(found.sets, turns);
  const int64_t useful = clamp<int64_t>(bytes_of_set / kLeastPart, 1, share);
  if (useful > parts) parts = useful;
  found.parts = static_cast<int>(parts);
  found.chunk = round_up<int64_t>(ceil_divide(length_of_set, parts), grain);
  const int64_t needed = ceil_divide(found.chunk, at_once) * bytes_at_once;
  found.bytes = 2 * (needed < buffer ? needed : buffer);
  return found.chunk <= 8 * fits && found.chunk * row <= kLongest;
}

// Ways to hold a set, from the one that costs least.
enum class Way {
  neighbours,  // one block or a cluster
  team,        // whose blocks read each other's sums for a fraction of what they read of tensors
  any_team,
};

// With sets of this tile.
inline bool fits(const Plan& plan, const Keeping& keeping, const Device& device, Way way,
                 Residency& found) {
  const int64_t across =
      plan.channels_last() ? ceil_divide<int64_t>(plan.C, int64_t{found.tile}) : plan.C;
  found.sets = plan.ghosts * across;
  const int64_t of_set =
      length(plan, keeping) * found.tile * keeping.size * int64_t{keeping.tensors};
  const int64_t wanted = ceil_divide<int64_t>(2 * device.multiprocessors, found.sets);
  const int64_t useful = clamp<int64_t>(of_set / kSmallPart, 1, wanted);
  found.cluster = false;
  if (way == Way::neighbours) {
    const int64_t most = device.clusters ? kMostCluster : 1;
    int64_t parts = parts_for(plan, keeping, found, room(plan, keeping, device, 2), most);
    if (parts == 0 || (!device.clusters && useful > 1)) return false;
    if (parts < useful) parts = useful < most ? useful : most;
    int64_t whole = 1;
    while (whole < parts) whole *= 2;
    found.cluster = whole > 1;
    cut(plan, keeping, found, whole);
    return true;
  }
  for (int blocks = 2; blocks > 0; --blocks) {
    const int64_t resident = int64_t{blocks} * device.multiprocessors;
    const int64_t parts =
        parts_for(plan, keeping, found, room(plan, keeping, device, blocks), resident);
    if (parts == 0) continue;
    // Each block reads the sums of all parts: a quarter of what it reads of tensors, at most.
    const auto cheap = [&](int64_t count) {
      return 4 * count * count * found.tile * keeping.sums <= of_set;
    };
    if (way == Way::team && !cheap(parts)) return false;
    // No block that the teams leave over.
    const int64_t teams = resident / parts < found.sets ? resident / parts : found.sets;
    int64_t more = resident / teams < of_set / kSmallPart ? resident / teams : of_set / kSmallPart;
    more = clamp(more, parts, resident);
    while (more > parts && !cheap(more)) --more;
    cut(plan, keeping, found, more);
    return true;
  }
  return false;
}

}  // namespace residency

// The widest tiles that fit; where none does, the narrowest in part, if that is at least half.
inline Residency make_residency(const Plan& plan, const Keeping& keeping, Device device,
                                bool planes = false) {
  using residency::Way;
  device.multiprocessors = for_teams(device);
  Residency found;
  if (!keep_on_chip) return found;
  if (planes && !flows) return found;
  if (!plan.channels_last() && flows) {
    found.possible = residency::flow(plan, keeping, device, planes, found);
    return found;
  }
  const int64_t narrowest = plan.channels_last() ? kSector / keeping.size : 1;
  int64_t widest = narrowest;
  while (plan.channels_last() && widest < plan.C && widest * keeping.size < kTileBytes) widest *= 2;
  // Teams read rows in pieces of a few sectors, which costs memory more than a second pass: so only
  // where all of it is held at once, in pieces of lines or whole rows.
  const int64_t of_line = kLine / keeping.size;
  const int64_t piece = plan.C < of_line ? round_up(plan.C, narrowest) : of_line;
  const auto all_at_once = [&] {
    return !plan.channels_last() || (teams_of_rows && found.sets == 1) ||
           (teams_of_rows && found.sets * found.parts <= int64_t{2} * device.multiprocessors);
  };
  for (const Way way : {Way::neighbours, Way::team, Way::any_team}) {
    // Rows in pieces of one sector are worth a team's trouble to avoid.
    int64_t least = way == Way::neighbours && widest > narrowest ? 2 * narrowest : narrowest;
    if (plan.channels_last() && way != Way::neighbours) least = piece < widest ? piece : widest;
    for (int64_t tile = way == Way::any_team ? least : widest; tile >= least; tile /= 2) {
      found.tile = static_cast<int>(tile);
      found.possible =
          residency::fits(plan, keeping, device, way, found) && (!found.team() || all_at_once());
      if (found.possible) return found;
    }
  }
  found.sets =
      plan.ghosts * (plan.channels_last() ? ceil_divide<int64_t>(plan.C, found.tile) : plan.C);
  found.cluster = false;
  if (!all_at_once()) return found;
  const int64_t pair = 2 * residency::room(plan, keeping, device, 2);
  const int64_t alone = residency::room(plan, keeping, device, 1);
  const int blocks = pair * 5 > alone * 4 ? 2 : 1;
  const int64_t room = blocks == 2 ? pair / 2 : alone;
  if (room <= 0) return found;
  residency::cut(plan, keeping, found, int64_t{blocks} * device.multiprocessors);
  found.possible = room * 2 >= found.bytes;
  found.bytes = room;
  return found;
}

// ---- as the kernels see it

struct Team {
  int64_t sets;
  int parts;
  int kept;      // units of a tensor that a thread keeps
  int channels;  // of a set, at most
  int lanes;     // neighbours that merge a channel's parts
  bool cluster;
  void* sums;          // [sets, parts, channels], where a team meets
  unsigned* arrivals;  // [sets], 0 at first; null where none meets
  void* results;       // [sets], where sets flow
};

// Where the parts of the workspace of a team lie.
struct TeamPlaces {
  static constexpr size_t kResult = 32;  // bytes of a set's
  size_t sums;                           // bytes
  size_t arrivals;
  size_t results;

  TeamPlaces(const Residency& found, const Keeping& keeping)
      : sums(found.team()
                 ? static_cast<size_t>(found.sets * found.parts * found.tile * keeping.sums)
                 : 0),
        arrivals(found.team() ? round_up<size_t>(static_cast<size_t>(found.sets) * 4, 16) : 0),
        results(found.flow ? static_cast<size_t>(found.sets * found.tile) * kResult : 0) {
    sums = round_up<size_t>(sums, 16);
  }
  size_t bytes() const { return sums + arrivals + results; }
};

template <class T, int W>
Team make_team(const Plan& plan, const Keeping& keeping, const Residency& found,
               const TeamPlaces& places, void* workspace) {
  Team team{};
  team.sets = found.sets;
  team.parts = found.parts;
  const int64_t fit = found.bytes / (found.flow ? 2 : 1) / residency::unit_bytes(keeping, W);
  const int64_t all = residency::units(plan, keeping, found, W);
  team.kept = static_cast<int>(fit < all ? fit : all);
  team.channels = found.tile;
  team.lanes = 1;
  while (team.lanes < kWarp && team.lanes < found.parts &&
         team.lanes * 2 * found.tile <= kThreads) {
    team.lanes *= 2;
  }
  team.cluster = found.cluster;
  if (found.team()) {
    team.sums = workspace;
    team.arrivals =
        reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + places.sums);
    team.results = static_cast<unsigned char*>(workspace) + places.sums + places.arrivals;
  }
  return team;
}

// Calls run(TypeIs<T>, integral_constant<Layout>, integral_constant<int, W>, activation); where
// units are narrower than 16 bytes, or `any` is set, one instance serves all activations.
template <class F>
const char* dispatch_resident(const char* operation, const BatchNormShape& shape, const Plan& plan,
                              std::initializer_list<const void*> pointers, F&& run,
                              bool any = false) {
  const float slope = static_cast<float>(shape.slope);
  return dispatch_dtype(operation, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_layout(plan.layout, [&](auto layout) {
      return dispatch_width<T>(plan.row(), pointers, [&](auto width) -> const char* {
        constexpr int W = decltype(width)::value;
        if constexpr (W < kWidest<T>) {
          return run(type, layout, width, AnyActivation{shape.activation, slope});
        } else {
          if (any) return run(type, layout, width, AnyActivation{shape.activation, slope});
          return with_activation<Identity, Relu>(
              shape.activation, slope, [&](auto act) { return run(type, layout, width, act); });
        }
      });
    });
  });
}

// Where sets are to flow by planes of several channels: of whole units, if pointers allow it.
inline Residency residency_for(const Plan& plan, const Keeping& keeping, const Device& device,
                               std::initializer_list<const void*> pointers) {
  const Residency planes = make_residency(plan, keeping, device, true);
  bool aligned = planes.possible;
  for (const void* p : pointers) aligned = aligned && is_aligned(p, 16);
  return aligned ? planes : make_residency(plan, keeping, device);
}

// Of the workspace, wherever the tensors lie.
inline size_t team_bytes(const Plan& plan, const Keeping& keeping, const Device& device) {
  size_t most = 0;
  for (const bool planes : {false, true}) {
    const Residency found = make_residency(plan, keeping, device, planes);
    const size_t bytes = found.possible ? TeamPlaces(found, keeping).bytes() : 0;
    if (bytes > most) most = bytes;
  }
  return most;
}

// Calls run(TypeIs<T>, integral_constant<int, W>, activation) with units of 16 bytes.
template <class F>
const char* dispatch_planes(const char* operation, const BatchNormShape& shape, F&& run,
                            bool any = false) {
  const float slope = static_cast<float>(shape.slope);
  return dispatch_dtype(operation, shape.dtype, [&](auto type) -> const char* {
    constexpr int W = kWidest<typename decltype(type)::type>;
    const std::integral_constant<int, W> width{};
    if (any) return run(type, width, AnyActivation{shape.activation, slope});
    return with_activation<Identity, Relu>(shape.activation, slope,
                                           [&](auto act) { return run(type, width, act); });
  });
}

// Launches `kernel`, which takes `args` with a Team in it, and `act`. Leaves `done` alone where
// there is no room for a team: on the device, or in what a process or a stream may have of it,
// which is less than the device where multiprocessors have been set apart.
template <class Arguments, class Act>
const char* launch_team(const char* operation, const char* name,
                        void (*kernel)(const Arguments, const Act), const Residency& found,
                        const Arguments& args, const Act& act, int device, void* stream,
                        bool& done) {
  LaunchShape shape{dim3(1, 1, 1), dim3(kThreads, 1, 1), static_cast<size_t>(found.bytes)};
  int64_t blocks = 0;
  if (found.team()) {
    shape.cooperative = true;
    Device on;
    if (const char* error = query(operation, device, on)) return error;
    if (const char* error = resident_blocks(name, kernel, shape, device, &blocks)) return error;
    const int64_t most = blocks / on.multiprocessors * for_teams(on) / found.parts;
    const int64_t teams = most == 0 ? 0 : ceil_divide(found.sets, ceil_divide(found.sets, most));
    if (teams == 0) return nullptr;
    blocks = (teams < found.sets ? teams : found.sets) * found.parts;
    if (const char* error =
            check(operation, "cudaMemsetAsync",
                  cudaMemsetAsync(args.team.arrivals, 0, static_cast<size_t>(found.sets) * 4,
                                  static_cast<cudaStream_t>(stream)))) {
      return error;
    }
  } else {
    if (const char* error = grid_size(operation, device, found.sets * found.parts, blocks)) {
      return error;
    }
    blocks = round_up<int64_t>(blocks, found.parts);
    if (found.cluster) shape.cluster = static_cast<unsigned>(found.parts);
  }
  shape.blocks.x = static_cast<unsigned>(blocks);
  const cudaError_t error = try_launch(name, kernel, shape, stream, args, act);
  if (found.team() && lacks_room(error)) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  done = true;
  return check(name, "launch", error);
}

// The units that a thread keeps between its two sweeps over a part.
template <class T, int W>
struct Kept {
  unsigned char* bytes;
  int units;  // of each tensor

  BATCHOPS_DEVICE bool has(int i) const { return i < units; }
  BATCHOPS_DEVICE Unit<T, W>& at(int tensor, int i) const {
    return reinterpret_cast<Unit<T, W>*>(
        bytes)[(tensor * units + i) * kThreads + static_cast<int>(threadIdx.x)];
  }
};

// How the blocks of a team learn of a set's outcome, where sets flow: each leaves its sums, and the
// last to come makes of them what all wait for. A count of parts + 1 says that it is there.
template <class Sums, class Result>
struct Passing {
  static_assert(sizeof(Result) <= TeamPlaces::kResult);
  const Team& team;

  BATCHOPS_DEVICE Sums& sums(int64_t set, int64_t part, int channel) const {
    return static_cast<Sums*>(team.sums)[(set * team.parts + part) * team.channels + channel];
  }
  BATCHOPS_DEVICE Result& result(int64_t set, int channel) const {
    return *reinterpret_cast<Result*>(static_cast<unsigned char*>(team.results) +
                                      (set * team.channels + channel) *
                                          static_cast<int64_t>(TeamPlaces::kResult));
  }

  // All threads, after those that leave the block's sums: whether the block is the last one.
  BATCHOPS_DEVICE bool arrive(int64_t set) const {
    BATCHOPS_SHARED(last, int);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(team.arrivals + set, 1u) + 1 == static_cast<unsigned>(team.parts) ? 1 : 0;
      __threadfence();
    }
    __syncthreads();
    return last != 0;
  }
  // All threads of the last block, once the results are written.
  BATCHOPS_DEVICE void tell(int64_t set) const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(team.arrivals + set, 1u);
  }
  // All threads. Afterwards the result can be read.
  BATCHOPS_DEVICE void wait(int64_t set) const {
    if (threadIdx.x == 0) {
      const volatile unsigned* arrivals = team.arrivals + set;
      while (*arrivals <= static_cast<unsigned>(team.parts)) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }
};

// A block's part in one set, and how it learns of the others' sums.
template <class Sums>
struct Meeting {
  const Team& team;
  int64_t set;
  int rank;
  Sums* own;  // [channels], in shared memory

  // Where the block writes its sums.
  BATCHOPS_DEVICE Sums* place() const { return team.arrivals == nullptr ? own : slot(rank); }
  BATCHOPS_DEVICE Sums of(int other, int channel) const {
    if (team.arrivals != nullptr) return slot(other)[channel];
    return team.cluster ? *of_rank(own + channel, other) : own[channel];
  }

  // All threads. Afterwards the sums of all parts can be read.
  BATCHOPS_DEVICE void meet() const {
    if (team.cluster) {
      cluster_sync();
      return;
    }
    __syncthreads();
    if (team.arrivals == nullptr) return;
    if (threadIdx.x == 0) {
      __threadfence();
      unsigned* arrivals = team.arrivals + set;
      atomicAdd(arrivals, 1u);
      while (*static_cast<volatile unsigned*>(arrivals) < static_cast<unsigned>(team.parts)) {
        __nanosleep(20);
      }
      __threadfence();
    }
    __syncthreads();
  }
  // All threads, after the last of().
  BATCHOPS_DEVICE void part() const {
    if (team.cluster) {
      cluster_sync();  // no block leaves, or writes new sums, while others may read its own
    } else {
      __syncthreads();
    }
  }

  // f(channel, lane, lanes) for each channel of the set, by `lanes` neighbours; in all lanes of a
  // warp together, with channel ≥ channels where there is nothing to do.
  template <class F>
  BATCHOPS_DEVICE void for_channels(int channels, F f) const {
    const int at_once = kThreads / team.lanes;
    const int first = static_cast<int>(threadIdx.x) / team.lanes;
    const int lane = static_cast<int>(threadIdx.x) % team.lanes;
    for (int c = 0; c < channels; c += at_once) f(c + first, lane, team.lanes);
  }

 private:
  BATCHOPS_DEVICE Sums* slot(int part) const {
    return static_cast<Sums*>(team.sums) + (set * team.parts + part) * team.channels;
  }
};

}  // namespace batchops::cuda
