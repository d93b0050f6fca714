// Batch norm that reads x once: the blocks that share a set (a ghost batch's channel, or its tile
// of channels) keep a part of it each in shared memory, tell each other their sums, and go on with
// what they have kept.
//
//   one block    the set fits it
//   a cluster    2, 4 or 8 blocks, which read each other's shared memory
//   a team       any number of blocks, all resident (a cooperative launch), that write their sums
//                to the workspace and count arrivals there, for each set anew
//
// In channels_first sets flow: a block has two at once, so that it sums over one while the others'
// sums of the one before arrive.
//
// A thread keeps what it has loaded itself: unit i of a tensor lies with those of its neighbours,
// and nobody else looks at it. Units beyond those that fit are read again, back to front, so that
// what was read last is still in the L2 cache.
//
//   shared memory:  tensor 0 [kept][kThreads] units, tensor 1 …
//
// Parts depend on the shape and the device: the same bits on every device of one kind.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/counters.cuh"

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
// run beside them (a reduction of gradients): BATCHOPS_CUDA_SM_MARGIN, 0 without it. A grid of
// teams starts when all of its blocks find room. They take most registers of a multiprocessor, so
// that those where another kernel runs take none of them: a margin helps where it is no less than
// that kernel's blocks (NCCL's reductions have 24 to 32).
extern int spared_multiprocessors;

// Blocks on a multiprocessor where sets flow: up to 80 registers a thread.
constexpr int kFlowing = 3;
// By launch bounds. More registers are wanted by planes, in the backward above all, there by units
// of eight elements (`crowded`), and by code for others than sm_90.
template <class Act>
constexpr int blocks_where_flowing(bool planes, bool crowded, bool backward) {
  if (planes && crowded && backward && kAnyActivation<Act>) return 1;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 1000 || __CUDA_ARCH__ < 800)
  return planes && crowded && backward ? 1 : kLeastResident;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  return kLeastResident;
#else
  const bool few = planes ? crowded || backward || kAnyActivation<Act> : crowded && backward;
  return few ? kLeastResident : kFlowing;
#endif
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
  int blocks = kFlowing;  // where sets flow: on a multiprocessor, at most
};

// How a tensor is held on the chip.
struct Residency {
  bool possible = false;
  int parts = 1;         // of a set
  bool cluster = false;  // they are one
  bool flow = false;     // a block has two sets at once
  bool planes = false;   // of which are taken together, `tile` of them; `chunk` is in samples
  int blocks = 2;        // on a multiprocessor
  int64_t sets = 0;
  int tile = 1;       // channels of a set
  int64_t chunk = 0;  // of a part: elements (channels_first), rows (channels_last)
  int64_t bytes = 0;  // dynamic shared memory of a block

  bool team() const { return parts > 1 && !cluster; }
  int even(int size) const { return static_cast<int>(kSector) / size; }
};

namespace residency {

// Static shared memory of the kernels: sums of 256 threads by channel, and a set's coefficients.
inline int64_t static_bytes(const Plan& plan, const Keeping& keeping) {
  if (!plan.channels_last()) return 1024;
  const int64_t widest = 16 / keeping.size;
  const bool table = keeping.size == 2 && keeping.tensors > 1;  // the backward's
  return 2 * widest * kThreads * 4 + kMostResidentTile * 48 +
         (table ? static_cast<int64_t>(sizeof(AffineTable<__half, kMostResidentTile>)) : 0) + 1024;
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

// Neighbours that merge a channel's parts.
inline int merging_lanes(int64_t parts, int64_t tile) {
  int lanes = 1;
  while (lanes < kWarp && lanes < parts && lanes * 2 * tile <= kThreads) lanes *= 2;
  return lanes;
}
constexpr int64_t kMostMerges = 8;  // parts that each has, where a team is not the only way

inline int64_t unit_bytes(const Keeping& keeping, int width) {
  return int64_t{kThreads} * width * keeping.size * keeping.tensors;
}

// Cuts sets of rows into so many parts.
inline void cut(const Plan& plan, const Keeping& keeping, Residency& found, int64_t parts) {
  found.parts = static_cast<int>(parts);
  found.chunk = ceil_divide(length(plan, keeping), parts);
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
// read again from the L2 cache. A set of one part has a block for itself, which waits for nobody.
inline bool flow(const Plan& plan, const Keeping& keeping, const Device& device, bool planes,
                 Residency& found) {
  constexpr int64_t kLeastPart = 16 * 1024;
  constexpr int64_t kLongest = 131072;  // elements: longer parts would want more careful sums
  const int64_t widest = 16 / keeping.size;
  found.tile = planes ? planes_together(plan, static_cast<int>(widest)) : 1;
  found.flow = true;
  found.planes = planes;
  if (planes && found.tile < 2) return false;
  found.sets = plan.columns() / found.tile;
  const int64_t length_of_set = planes ? plan.most_samples() : length(plan, keeping);
  const int64_t row = planes ? found.tile * plan.HxW : 1;  // elements of what is counted
  const int64_t grain = planes ? 1 : 256;                  // a chunk is a multiple of this
  const int64_t at_once = planes ? kThreads / (row / widest) : kThreads * widest;
  const int64_t bytes_at_once = unit_bytes(keeping, static_cast<int>(widest));
  found.blocks = keeping.blocks;
  int64_t buffer = 0;
  for (;; --found.blocks) {
    if (found.blocks == 0) return false;
    buffer = room(plan, keeping, device, found.blocks) / 2 - (planes ? kPlanesBytes : 0);
    if (buffer >= bytes_at_once) break;
  }
  const int64_t resident = int64_t{found.blocks} * device.multiprocessors;
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
  if (found.chunk > fits) {
    // Read again only where the L2 cache still has it, of all sets that are underway.
    constexpr int64_t kCached = 16 * 1024 * 1024;
    const int64_t teams = resident / parts < found.sets ? resident / parts : found.sets;
    if (found.chunk > 8 * fits || teams * bytes_of_set > kCached) return false;
  }
  return found.chunk * row <= kLongest;
}

// Ways to hold a set, from the one that costs least.
enum class Way {
  neighbours,  // one block or a cluster
  team,        // whose blocks read each other's sums for a fraction of what they read of tensors
  any_team,
};

// channels_last with sets of this tile.
inline bool fits(const Plan& plan, const Keeping& keeping, const Device& device, Way way,
                 Residency& found) {
  found.sets = plan.ghosts * ceil_divide<int64_t>(plan.C, int64_t{found.tile});
  const int64_t of_set =
      length(plan, keeping) * found.tile * keeping.size * int64_t{keeping.tensors};
  const int64_t wanted = ceil_divide<int64_t>(2 * device.multiprocessors, found.sets);
  const int64_t useful = clamp<int64_t>(of_set / kSmallPart, 1, wanted);
  found.cluster = false;
  found.blocks = 2;
  if (way == Way::neighbours) {
    const int64_t room_for = int64_t{found.blocks} * device.most_cluster;
    const int64_t most = !device.clusters ? 1 : room_for < kMostCluster ? room_for : kMostCluster;
    int64_t parts = parts_for(plan, keeping, found, room(plan, keeping, device, 2), most);
    if (parts == 0 || (!device.clusters && useful > 1)) return false;
    if (parts < useful) parts = useful < most ? useful : most;
    int64_t whole = 1;
    while (whole < parts) whole *= 2;
    found.cluster = whole > 1;
    cut(plan, keeping, found, whole);
    return true;
  }
  // Teams read rows in pieces of a few sectors, which costs memory more than a second pass: so only
  // where all of it is held at once, and by two blocks a multiprocessor, of which one loads while
  // the other waits.
  const int64_t resident = int64_t{found.blocks} * device.multiprocessors;
  const int64_t parts =
      parts_for(plan, keeping, found, room(plan, keeping, device, found.blocks), resident);
  if (parts == 0 || found.sets * parts > resident) return false;
  // Each block reads the sums of all parts: a quarter of what it reads of tensors, at most, and in
  // a few steps, since they are on its way.
  const auto cheap = [&](int64_t count) {
    return 4 * count * count * found.tile * keeping.sums <= of_set;
  };
  const auto soon = [&](int64_t count) {
    return ceil_divide<int64_t>(count, merging_lanes(count, found.tile)) <= kMostMerges;
  };
  if (way == Way::team && (!cheap(parts) || !soon(parts))) return false;
  // No block that the teams leave over.
  const int64_t share = resident / found.sets;
  int64_t more = share < of_set / kSmallPart ? share : of_set / kSmallPart;
  more = clamp(more, parts, resident);
  while (more > parts && !(cheap(more) && soon(more))) --more;
  cut(plan, keeping, found, more);
  return true;
}

}  // namespace residency

// The widest tiles that fit; where none does and one tile is all, in part, if that is at least
// half.
inline Residency make_residency(const Plan& plan, const Keeping& keeping, Device device,
                                bool planes = false) {
  using residency::Way;
  device.multiprocessors = for_teams(device);
  Residency found;
  if (!keep_on_chip || (planes && plan.channels_last())) return found;
  if (!plan.channels_last()) {
    found.possible = residency::flow(plan, keeping, device, planes, found);
    return found;
  }
  const int64_t narrowest = kSector / keeping.size;
  int64_t widest = narrowest;
  while (widest < plan.C && widest * keeping.size < kTileBytes) widest *= 2;
  // Teams have pieces of lines or whole rows.
  const int64_t of_line = kLine / keeping.size;
  const int64_t piece = plan.C < of_line ? round_up(plan.C, narrowest) : of_line;
  for (const Way way : {Way::neighbours, Way::team, Way::any_team}) {
    // Rows in pieces of one sector are worth a team's trouble to avoid.
    int64_t least = way == Way::neighbours && widest > narrowest ? 2 * narrowest : narrowest;
    if (way != Way::neighbours) least = piece < widest ? piece : widest;
    for (int64_t tile = way == Way::any_team ? least : widest; tile >= least; tile /= 2) {
      found.tile = static_cast<int>(tile);
      found.possible = residency::fits(plan, keeping, device, way, found);
      if (found.possible) return found;
    }
  }
  found.sets = plan.ghosts * ceil_divide<int64_t>(plan.C, found.tile);
  found.cluster = false;
  if (found.sets != 1) return found;
  const int64_t pair = 2 * residency::room(plan, keeping, device, 2);
  const int64_t alone = residency::room(plan, keeping, device, 1);
  found.blocks = pair * 5 > alone * 4 ? 2 : 1;
  const int64_t room = found.blocks == 2 ? pair / 2 : alone;
  if (room <= 0) return found;
  residency::cut(plan, keeping, found, int64_t{found.blocks} * device.multiprocessors);
  found.possible = room * 2 >= found.bytes;
  if (room < found.bytes) found.bytes = room;
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
  unsigned* arrivals;  // [sets, kApart], 0 at first; null where none meets

  // Those who poll one set's counter do not slow down those who count in another's line.
  static constexpr int64_t kApart = kLine / 4;
  BATCHOPS_DEVICE unsigned* counter(int64_t set) const { return arrivals + set * kApart; }
};

// Where the parts of the workspace of a team lie.
struct TeamPlaces {
  size_t sums;  // bytes
  size_t arrivals;

  TeamPlaces(const Residency& found, const Keeping& keeping)
      : sums(found.team()
                 ? static_cast<size_t>(found.sets * found.parts * found.tile * keeping.sums)
                 : 0),
        arrivals(found.team() ? static_cast<size_t>(found.sets * Team::kApart) * 4 : 0) {
    sums = round_up<size_t>(sums, kLine);
  }
  size_t bytes() const { return sums + arrivals; }
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
  team.lanes = residency::merging_lanes(found.parts, found.tile);
  team.cluster = found.cluster;
  if (found.team()) {
    team.sums = workspace;
    team.arrivals =
        reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + places.sums);
  }
  return team;
}

// Calls run(TypeIs<T>, integral_constant<int, W>, activation).
template <class F>
const char* dispatch_resident(const char* operation, const BatchNormShape& shape, const Plan& plan,
                              std::initializer_list<const void*> pointers, F&& run, bool any) {
  return dispatch_dtype(operation, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<T>(plan.row(), pointers, [&](auto width) {
      return dispatch_activation<T, decltype(width)::value>(
          shape, any, [&](auto act) { return run(type, width, act); });
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

// Of the workspace, wherever the tensors lie and however many blocks a multiprocessor takes.
inline size_t team_bytes(const Plan& plan, Keeping keeping, const Device& device) {
  size_t most = 0;
  for (keeping.blocks = kFlowing; keeping.blocks > 0; --keeping.blocks) {
    for (const bool planes : {false, true}) {
      const Residency found = make_residency(plan, keeping, device, planes);
      const size_t bytes = found.possible ? TeamPlaces(found, keeping).bytes() : 0;
      if (bytes > most) most = bytes;
    }
  }
  return most;
}

// Calls run(TypeIs<T>, integral_constant<int, W>, activation) with units of 16 bytes.
template <class F>
const char* dispatch_planes(const char* operation, const BatchNormShape& shape, F&& run, bool any) {
  return dispatch_dtype(operation, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::integral_constant<int, kWidest<T>> width{};
    return dispatch_activation<T, kWidest<T>>(shape, any,
                                              [&](auto act) { return run(type, width, act); });
  });
}

// With ghost batches the workspace has results of columns [C, ghosts] behind the team's.
template <class Result>
size_t columns_bytes(const Plan& plan) {
  return plan.ghosts > 1 ? static_cast<size_t>(plan.columns()) * sizeof(Result) : 0;
}
template <class Result>
Result* columns_of(const Plan& plan, const TeamPlaces& places, void* workspace) {
  if (plan.ghosts == 1) return nullptr;
  return reinterpret_cast<Result*>(static_cast<unsigned char*>(workspace) + places.bytes());
}

// Calls launched(name, TypeIs<T>, integral_constant<int, W>, activation, kernel) with the one of
// Kernels that `found` takes:
//
//   flow_name, flow<T, W, kPlanes, Act>()       where sets flow
//   resident_name, resident<T, W, Act>()        elsewhere
template <class Kernels, class Launched>
const char* dispatch_kernel(const char* operation, const BatchNormShape& shape, const Plan& plan,
                            const Residency& found, std::initializer_list<const void*> pointers,
                            bool any, Launched&& launched) {
  if (found.planes) {
    return dispatch_planes(
        operation, shape,
        [&](auto type, auto width, auto act) {
          using T = typename decltype(type)::type;
          constexpr int W = decltype(width)::value;
          return launched(Kernels::flow_name, type, width, act,
                          Kernels::template flow<T, W, true, decltype(act)>());
        },
        any);
  }
  return dispatch_resident(
      operation, shape, plan, pointers,
      [&](auto type, auto width, auto act) {
        using T = typename decltype(type)::type;
        constexpr int W = decltype(width)::value;
        if (found.flow) {
          return launched(Kernels::flow_name, type, width, act,
                          Kernels::template flow<T, W, false, decltype(act)>());
        }
        return launched(Kernels::resident_name, type, width, act,
                        Kernels::template resident<T, W, decltype(act)>());
      },
      any);
}

// Launches `kernel` with the arguments that make(found) gives, which have a Team in them, and
// `act`. Where sets flow, the blocks that a multiprocessor takes of this kernel decide how they are
// cut. Leaves `done` alone where there is no room for a team: on the device, or in what a process
// or a stream may have of it, which is less than the device where multiprocessors have been set
// apart.
template <class Arguments, class Act, class Make>
const char* launch_team(const char* operation, const char* name,
                        void (*kernel)(const Arguments, const Act), const Plan& plan,
                        Keeping keeping, Residency found, Make make, const Act& act, int device,
                        void* stream, bool& done) {
  LaunchShape shape{dim3(1, 1, 1), dim3(kThreads, 1, 1), static_cast<size_t>(found.bytes)};
  int64_t blocks = 0;
  if (found.flow || found.team()) {
    Device on;
    if (const char* error = query(operation, device, on)) return error;
    for (;;) {
      if (const char* error = resident_blocks(name, kernel, shape, device, &blocks)) return error;
      const int each = static_cast<int>(blocks / on.multiprocessors);
      if (!found.flow || each >= found.blocks || each == 0) break;
      keeping.blocks = each;
      found = make_residency(plan, keeping, on, found.planes);
      if (!found.possible) return nullptr;
      shape.shared_bytes = static_cast<size_t>(found.bytes);
    }
    shape.cooperative = found.team();
    const int64_t most = blocks / on.multiprocessors * for_teams(on) / found.parts;
    const int64_t teams = most == 0 ? 0 : ceil_divide(found.sets, ceil_divide(found.sets, most));
    if (teams == 0) return nullptr;
    blocks = (teams < found.sets ? teams : found.sets) * found.parts;
  } else {
    if (const char* error = grid_size(operation, device, found.sets * found.parts, blocks)) {
      return error;
    }
    blocks = round_up<int64_t>(blocks, found.parts);
    if (found.cluster) shape.cluster = static_cast<unsigned>(found.parts);
  }
  const Arguments args = make(found);
  if (found.team()) {
    const size_t bytes = TeamPlaces(found, keeping).arrivals;
    if (const char* error = check(
            operation, "cudaMemsetAsync",
            cudaMemsetAsync(args.team.arrivals, 0, bytes, static_cast<cudaStream_t>(stream)))) {
      return error;
    }
  }
  shape.blocks.x = static_cast<unsigned>(blocks);
  const cudaError_t error = try_launch(name, kernel, shape, stream, args, act);
  if (lacks_room(shape, error)) {
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

// Whether units go to shared memory by copies that nobody waits for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T, int W>
constexpr bool kCopies = false;
#else
template <class T, int W>
constexpr bool kCopies = Unit<T, W>::kBytes >= 4;
#endif

// Starts to bring one unit of each of `count` tensors to where it is kept.
template <int kTensors, class T, int W>
BATCHOPS_DEVICE void bring_unit(const Kept<T, W>& kept, int i, const T* const (&from)[kTensors],
                                int count, int64_t offset) {
  static_assert(kCopies<T, W>);
#pragma unroll
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    if (tensor < count) {
      __pipeline_memcpy_async(&kept.at(tensor, i), from[tensor] + offset, sizeof(Unit<T, W>));
    }
  }
}
// The same of a batch of a chunk's units, as far as they are kept.
template <int kTensors, class MyChunk, class T, int W>
BATCHOPS_DEVICE void bring_batch(const MyChunk& chunk, int batch, const Kept<T, W>& kept,
                                 const T* const (&from)[kTensors], int count) {
  if constexpr (kCopies<T, W>) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = batch * kInFlight + u;
      if (!kept.has(i)) break;
      const Place place = chunk.place(batch, u);
      if (place.valid) bring_unit(kept, i, from, count, place.offset);
    }
  } else {
#pragma unroll
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      if (tensor >= count) break;
      Unit<T, W> units[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const Place place = chunk.place(batch, u);
        if (place.valid) units[u] = load_unit<T, W>(from[tensor] + place.offset);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = batch * kInFlight + u;
        if (kept.has(i)) kept.at(tensor, i) = units[u];
      }
    }
  }
}

// Brings a chunk's units while the thread works on those that have come: a few batches ahead.
template <int kTensors, class MyChunk, class T, int W>
struct Bringing {
  static constexpr int kBatches = 4;
  const MyChunk& chunk;
  const Kept<T, W>& kept;
  const T* const (&from)[kTensors];
  int count;

  BATCHOPS_DEVICE void start() const {
#pragma unroll 1
    for (int batch = 0; batch + 1 < kBatches; ++batch) next(batch);
  }
  BATCHOPS_DEVICE void next(int batch) const {
    if (batch * kInFlight < kept.units) bring_batch(chunk, batch, kept, from, count);
    __pipeline_commit();
  }
  // Afterwards those of this batch, as far as they are kept, are there.
  BATCHOPS_DEVICE void ready(int batch) const {
    next(batch + kBatches - 1);
    __pipeline_wait_prior(kBatches - 1);
    keep_order();
  }
};

// How the blocks of a team learn of a set's sums, where sets flow: each leaves its own, counts, and
// asks for the count only when it has summed over the next set too. Then each merges all of them.
//
// Progress: all blocks of a team take the same sets in the same order, and each arrives at a set
// before it waits for the one before it. So of the sets that anybody waits for, the earliest has
// been arrived at by everyone who waits, and who does not wait is on the way there: all blocks run,
// the launch being a cooperative one.
//
// Where a set has one part, its sums stay in the block, of two sets in turn.
template <class Sums>
struct Passing {
  const Team& team;
  Sums* own;  // [2, most]
  int most;

  BATCHOPS_DEVICE bool alone() const { return team.arrivals == nullptr; }
  BATCHOPS_DEVICE Sums& sums(int64_t set, unsigned turn, int64_t part, int channel) const {
    if (alone()) return own[turn % 2 * most + channel];
    return static_cast<Sums*>(team.sums)[(set * team.parts + part) * team.channels + channel];
  }
  // All threads, after those that leave the block's sums.
  BATCHOPS_DEVICE void arrive(int64_t set) const {
    __syncthreads();
    // A warp that merges as late as any: the others need not wait for what this waits for.
    if (threadIdx.x == kThreads - 1 && !alone()) count_one(team.counter(set));
  }
  // A warp. Afterwards it can read the sums of all parts.
  BATCHOPS_DEVICE void wait(int64_t set) const {
    if (threadIdx.x % kWarp == 0 && !alone())
      wait_for(team.counter(set), static_cast<unsigned>(team.parts));
    __syncwarp();
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
      unsigned* counter = team.counter(set);
      count_one(counter);
      wait_for(counter, static_cast<unsigned>(team.parts));
    }
    __syncthreads();
  }
  // All threads, after the last of(). No block leaves, or writes new sums, while others may read
  // its own: they say so here, before they write elements for which they would have to wait.
  BATCHOPS_DEVICE void leave() const {
    if (team.cluster) cluster_arrive();
    __syncthreads();
  }
  // All threads, at the set's end.
  BATCHOPS_DEVICE void part() const {
    __syncthreads();
    if (team.cluster) cluster_wait();
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
