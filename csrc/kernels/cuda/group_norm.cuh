// What the group norm kernels of forward and backward share: how a tensor is cut into parts, one
// for a block at a time, and how a block keeps its part in shared memory and sums over it.
//
// Two walks, by how a group lies in memory:
//
//   slices (group_norm_slices.cuh)   channels_first, or HxW = 1: a group is M consecutive elements.
//                                    A part is some whole groups, or a stretch of one.
//   pixels (group_norm_pixels.cuh)   channels_last: a group is D = C/G columns of HxW rows of C.
//                                    A part is some rows of a tile of columns.
//
// Three ways, by the size of what must be seen at once (a group; in pixels a tile of groups):
//
//   one block      its part holds whole groups: each tensor is read once
//   one cluster    `parts` blocks keep a stretch each and exchange their sums: the same
//   streams        beyond: each block writes the sums of its part to the workspace, a second kernel
//                  merges them, a third reads the tensors once more
//
// Sums are floats around a shift near the mean, over one part; parts are merged in double, in
// order. The same cut, and so the same bits, on every device of one kind.
#pragma once
#include <limits>
#include <numeric>
#include <type_traits>

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/norm.cuh"
#include "kernels/group_norm.h"

namespace batchops::cuda::group {

// Two blocks of a multiprocessor have up to 80 registers a thread: enough for the coefficients of
// eight columns, and 24 warps.
constexpr int kBlock = 384;
constexpr int kFinishBlock = 256;
constexpr int kWidestUnit = 8;
constexpr int64_t kSmallPart = 24 * 1024;  // bytes: small groups are put together up to this
constexpr int64_t kEnoughPart = 4 * 1024;  // … and at least to this
constexpr int64_t kStreamPart = 64 * 1024;
constexpr int64_t kLongPlane = 64;   // elements
constexpr int64_t kReserved = 1024;  // of shared memory: by the driver, for each block
constexpr int64_t kTileBytes = 256;  // pixels: of a row, where groups allow
constexpr int64_t kPlaceBytes = 80;  // of where a part lies

// Channels that a thread sums over at once: their sums and coefficients are in registers.
__host__ __device__ constexpr int sum_width(int unit) { return unit < 4 ? unit : 4; }

// How a block sums over rows: `lanes` neighbours take a segment of a row together.
struct RowTeams {
  Lanes lanes;
  int segments = 1;  // of a row
  int segment = 8;   // elements
  FastDivide by_segments;

  RowTeams() = default;
  RowTeams(int64_t rows, int64_t length, int width) {
    while (lanes.count() < kWarp && int64_t{lanes.count()} * 2 * width <= length) ++lanes.shift;
    // In units that a lane takes: what a segment and, at the end, a place cost besides.
    constexpr double kOfSegment = 2.0, kOfPlace = 0.1;
    const int64_t teams = at_once();
    const int64_t step = int64_t{lanes.count()} * width;
    const int64_t most = clamp<int64_t>(length / (step * 2), 1, teams);
    double least = std::numeric_limits<double>::max();
    for (int64_t cuts = 1; cuts <= most; ++cuts) {
      const int64_t stretch = round_up<int64_t>(ceil_divide(length, cuts), 8);
      const int64_t found = ceil_divide(length, stretch);
      const int64_t turns = ceil_divide(rows * found, teams);
      const int64_t units = ceil_divide(stretch, step);
      const double cost = static_cast<double>(turns) * (static_cast<double>(units) + kOfSegment) +
                          kOfPlace * static_cast<double>(found);
      if (cost >= least) continue;
      least = cost;
      segment = static_cast<int>(stretch);
      segments = static_cast<int>(found);
    }
    by_segments = FastDivide(static_cast<unsigned>(segments));
  }

  __host__ __device__ int at_once() const { return kBlock >> lanes.shift; }
  // Teams of the warps before this thread's: a warp whose first team has nothing left is done.
  BATCHOPS_DEVICE int before_warp() const {
    return lanes.team(static_cast<int>(threadIdx.x) & -kWarp);
  }
};

// Pixels: how threads lie over the units of a tile: `tile` side by side, `across` times over where
// there are more units, and as many rows at once as there are threads left.
struct ColumnTiles {
  int tile = 1, across = 1, rows_at_once = 1;
  Lanes lanes;  // that add up the rows of a column
  FastDivide by_tile, by_rows;

  ColumnTiles() = default;
  ColumnTiles(int64_t units, int columns_at_once) {
    tile = static_cast<int>(units < kBlock ? units : kBlock);
    across = static_cast<int>(ceil_divide<int64_t>(units, tile));
    rows_at_once = kBlock / tile;
    while (lanes.count() < kWarp && lanes.count() * 2 <= rows_at_once &&
           tile * columns_at_once * lanes.count() * 2 <= kBlock) {
      ++lanes.shift;
    }
    by_tile = FastDivide(static_cast<unsigned>(tile));
    by_rows = FastDivide(static_cast<unsigned>(rows_at_once));
  }
};

// The tensor as the kernels walk it.
struct Cut {
  int64_t N, C, HxW, G;
  int64_t D, M;  // channels and elements of a group
  int64_t groups, numel;
  bool pixels;
  bool resident;
  int parts;         // that a group is in; slices streamed, clusters
  int64_t chunk;     // slices: of a group, padded as the mask; pixels: rows of a part
  int64_t pieces;    // parts in all
  int64_t rounds;    // parts that a block takes one after the other
  int64_t turns;     // of so many parts
  int64_t sum_rows;  // of the backward's sums by channel
  // slices
  bool by_sample;  // layer norm's backward: sums by channel run over the samples of a block
  int64_t whole;   // groups of a part, where parts = 1
  int64_t mask_row, padded_row;
  bool padded;         // rows of the mask end within a byte
  bool one_channel;    // units lie within a channel
  bool whole_samples;  // … and the bits of a unit within a byte
  bool contiguous;     // units lie within a group and their channels follow one another
  bool whole_groups, whole_channels;  // begin and end on units
  bool tabled;  // … of planes so long that the coefficients of channels are a table
  RowSplit plane, mask_rows, padded_rows;
  FastDivide by_C, by_D;
  WideDivide by_parts, by_tiles, by_G, by_HxW, by_mask_row;
  // pixels
  int64_t width, tiles;  // columns
  int64_t mask_row_bytes;
  int kept_row;                   // elements of a row in shared memory
  ColumnTiles by_unit, by_sum;    // units of the widest, and of those that are summed over at once
  Lanes group_lanes, part_lanes;  // that merge a group's columns or stretches, its parts
  // of a part, at most
  int elements, channels, local_groups;
  // Sums over elements (slices) or columns (pixels) of groups, elements of channels, channels of
  // groups.
  RowTeams over_groups, over_channels, over_group_channels;

  __host__ __device__ bool cluster() const { return resident && parts > 1; }
  int64_t moments() const {  // slots of the workspace
    return resident ? 0 : pieces * local_groups;
  }
};

// Where things lie in a block's shared memory, in bytes. The tensors come first.
struct SharedPlan {
  int tensor;    // bytes of each
  int tails;     // bytes [elements]: see Tails
  int slots;     // float2 or Moments [rows · segments]; in pixels float2 [kBlock · sum_width]
  int channels;  // float2 [channels]
  int shifts;    // float [channels]; forward, in pixels
  int sums;      // float2 [local_groups]
  int moments;   // Moments [local_groups]
  int terms;     // Terms [local_groups]
  int place;     // SlicesPlace or PixelsPlace
  int table;     // coefficients [channels], where tabled
  int64_t total;
};

// What an element needs of its group; along and constant are the backward's.
struct Terms {
  float mean, low, rstd;
  float along, constant;
};

struct Purpose {
  int tensors;  // kept in shared memory
  int size;     // of an element
  bool backward;
  bool mask;
  bool tails = false;

  int64_t bytes() const { return int64_t{size} * tensors + (tails ? 1 : 0); }  // of an element
};

inline int64_t table_bytes(const Cut& cut, bool backward) {
  return cut.tabled ? int64_t{cut.channels} * (backward ? 32 : 16) : 0;
}

inline SharedPlan plan_shared(const Cut& cut, const Purpose& purpose, int width) {
  SharedPlan plan{};
  const auto take = [&](int64_t bytes) {
    const auto from = static_cast<int>(plan.total);
    plan.total += round_up<int64_t>(bytes, 16);
    return from;
  };
  const int64_t tensor = round_up<int64_t>(int64_t{cut.elements} * purpose.size, 16);
  plan.tensor = static_cast<int>(tensor);
  take(tensor * purpose.tensors);
  plan.tails = take(purpose.tails ? cut.elements : 0);
  int64_t slots = cut.pixels ? int64_t{kBlock + 1} * sum_width(width) : 0;  // float2
  const auto segments = [&](int64_t rows, const RowTeams& teams, int64_t each) {
    if (rows * teams.segments * each > slots) slots = rows * teams.segments * each;
  };
  if (!cut.pixels) segments(cut.local_groups, cut.over_groups, 2);
  if (purpose.backward && !cut.pixels) segments(cut.channels, cut.over_channels, 1);
  if (purpose.backward) segments(cut.local_groups, cut.over_group_channels, 1);
  plan.slots = take(slots * int64_t{sizeof(float2)});
  plan.channels =
      take(purpose.backward || cut.pixels ? int64_t{cut.channels} * int64_t{sizeof(float2)} : 0);
  plan.shifts = take(!purpose.backward && cut.pixels ? int64_t{cut.channels} * 4 : 0);
  plan.sums = take(int64_t{cut.local_groups} * int64_t{sizeof(float2)});
  plan.moments = take(int64_t{cut.local_groups} * int64_t{sizeof(Moments)});
  plan.terms = take(int64_t{cut.local_groups} * int64_t{sizeof(Terms)});
  plan.place = take(kPlaceBytes);
  plan.table = take(table_bytes(cut, purpose.backward));
  return plan;
}

// What the elementwise kernels have there, where groups are streamed.
inline SharedPlan plan_apply(const Cut& cut, bool backward) {
  SharedPlan plan{};
  plan.table = round_up<int>(cut.local_groups * static_cast<int>(sizeof(Terms)), 16);
  plan.total = plan.table + table_bytes(cut, backward);
  return plan;
}

// Layer norm, of a shape or a cut.
template <class Shape>
bool is_layer_norm(const Shape& shape) {
  return shape.HxW == 1 && shape.G == 1;
}
// Its backward, which needs sums over samples.
inline bool samples(const Cut& cut, const Purpose& purpose) {
  return purpose.backward && !cut.pixels && is_layer_norm(cut);
}

// Neighbours that merge `count` statistics of each group, so that all groups are done at once.
inline Lanes merging_lanes(int64_t groups, int64_t count) {
  Lanes lanes;
  while (lanes.count() < kWarp && lanes.count() < count && groups * lanes.count() * 2 <= kBlock) {
    ++lanes.shift;
  }
  return lanes;
}

// Everything that follows from parts, chunk and width.
inline void complete_but_divisions(Cut& cut, const Purpose& purpose, int unit,
                                   const Device& device) {
  cut.rounds = 1;
  cut.by_sample = false;
  if (cut.pixels) {
    cut.tiles = ceil_divide(cut.C, cut.width);
    cut.chunk = cut.resident ? ceil_divide(cut.HxW, int64_t{cut.parts}) : cut.chunk;
    cut.parts = static_cast<int>(ceil_divide(cut.HxW, cut.chunk));
    cut.pieces = cut.N * cut.tiles * cut.parts;
    cut.elements = static_cast<int>(cut.chunk * round_up<int64_t>(cut.width, unit));
    cut.channels = static_cast<int>(cut.width);
    const bool whole = cut.width % cut.D == 0;
    const int64_t touched = cut.width / cut.D + (whole ? 0 : 2);
    cut.local_groups = static_cast<int>(clamp<int64_t>(touched, 1, cut.G));
    const int64_t units = ceil_divide<int64_t>(cut.width, unit);
    const int64_t padded = purpose.mask ? round_up<int64_t>(units, ceil_divide(8, unit)) : units;
    cut.kept_row = static_cast<int>(units * unit);
    cut.by_unit = ColumnTiles(padded, unit);
    cut.by_sum = ColumnTiles(padded * unit / sum_width(unit), sum_width(unit));
    const int64_t columns = cut.D < cut.width ? cut.D : cut.width;
    cut.over_group_channels = RowTeams(cut.local_groups, columns, 1);
    cut.group_lanes = merging_lanes(cut.local_groups, columns);
    cut.part_lanes = merging_lanes(cut.local_groups, cut.parts);
    cut.sum_rows = cut.N * cut.parts;
    return;
  }
  const int64_t padded_group = cut.M / cut.mask_row * cut.padded_row +
                               (cut.M % cut.mask_row);  // the last only where rows are not padded
  if (cut.parts > 1) {
    if (cut.resident)
      cut.chunk = round_up<int64_t>(ceil_divide(padded_group, int64_t{cut.parts}), 64);
    cut.parts = static_cast<int>(ceil_divide(padded_group, cut.chunk));
  }
  if (cut.parts > 1) {
    cut.whole = 1;
    cut.pieces = cut.groups * cut.parts;
    cut.elements = static_cast<int>(cut.chunk + 8);
    const int64_t touched = (cut.chunk - 1) / cut.HxW + 2;
    cut.channels = static_cast<int>(touched < cut.D ? touched : cut.D);
  } else {
    cut.pieces = ceil_divide(cut.groups, cut.whole);
    cut.elements = static_cast<int>(round_up<int64_t>(cut.whole * cut.M + 7, 8));
    cut.channels = static_cast<int>(cut.whole * cut.D);
  }
  cut.local_groups = static_cast<int>(cut.whole);
  cut.sum_rows = cut.N * cut.parts;
  if (samples(cut, purpose) && cut.resident && cut.parts == 1) {
    // A row of sums for each block: few beside the tensors. As many blocks as run at once, or a
    // multiple, so that none is left over for a wave of its own.
    constexpr int64_t kSamples = 64;
    cut.by_sample = true;
    cut.channels = static_cast<int>(cut.C);
    const int64_t at_once = 2 * int64_t{device.multiprocessors};
    const int64_t waves = ceil_divide(cut.pieces, at_once * ceil_divide(kSamples, cut.whole));
    cut.rounds = ceil_divide(cut.pieces, at_once * waves);
    cut.sum_rows = ceil_divide(cut.pieces, cut.rounds);
  }
  cut.one_channel = cut.HxW % unit == 0;
  cut.contiguous = cut.HxW == 1 && cut.M % unit == 0;
  cut.whole_samples = cut.contiguous && (!cut.padded || cut.mask_row % unit == 0);
  const int64_t length = cut.parts > 1 ? cut.chunk : cut.M;
  const bool aligned = cut.parts == 1 || !cut.padded;
  cut.whole_groups = cut.M % unit == 0 && aligned;
  cut.whole_channels = cut.HxW % unit == 0 && aligned;
  cut.tabled =
      unit > 1 && cut.whole_channels && cut.HxW >= kLongPlane && cut.HxW < int64_t{1} << 30;
  cut.over_groups = RowTeams(cut.local_groups, length, cut.whole_groups ? unit : 1);
  cut.over_channels =
      RowTeams(cut.channels, cut.HxW < length ? cut.HxW : length, cut.whole_channels ? unit : 1);
  cut.over_group_channels =
      RowTeams(cut.local_groups, cut.D < cut.channels ? cut.D : cut.channels, 1);
  cut.group_lanes = merging_lanes(cut.local_groups, cut.over_groups.segments);
  cut.part_lanes = merging_lanes(cut.local_groups, cut.parts);
}

inline void complete(Cut& cut, const Purpose& purpose, int unit, const Device& device) {
  complete_but_divisions(cut, purpose, unit, device);
  cut.turns = ceil_divide(cut.pieces, cut.rounds);
  cut.by_parts = WideDivide(cut.parts);
  cut.by_tiles = WideDivide(cut.pixels ? cut.tiles : 1);
}

// With HxW = 1 both layouts are slices, unless two groups would share a byte of the mask.
inline bool walks_pixels(const GroupNormShape& shape, bool mask) {
  if (shape.layout == Layout::channels_first) return false;
  return shape.HxW > 1 || (mask && shape.G > 1 && shape.C / shape.G % 8 != 0);
}

// How the tensor is cut for units of `unit` elements. Parts, and so the workspace, do not depend on
// the unit.
inline Cut make_cut(const GroupNormShape& shape, const Purpose& purpose, int unit,
                    const Device& device) {
  Cut cut{};
  cut.N = shape.N;
  cut.C = shape.C;
  cut.HxW = shape.HxW;
  cut.G = shape.G;
  cut.D = shape.C / shape.G;
  cut.M = cut.D * cut.HxW;
  cut.groups = cut.N * cut.G;
  cut.numel = shape.numel();
  cut.parts = 1;
  cut.whole = 1;
  cut.by_C = FastDivide(static_cast<unsigned>(cut.C));
  cut.by_D = FastDivide(static_cast<unsigned>(cut.D));
  const bool last = shape.layout == Layout::channels_last;
  cut.mask_row = last ? cut.C : cut.HxW;
  cut.padded = purpose.mask && cut.mask_row % 8 != 0;
  cut.padded_row = cut.padded ? round_up<int64_t>(cut.mask_row, 8) : cut.mask_row;
  cut.mask_row_bytes = mask_row_bytes(cut.mask_row);
  cut.pixels = walks_pixels(shape, purpose.mask);
  cut.by_G = WideDivide(cut.G);
  cut.by_HxW = WideDivide(cut.HxW);
  cut.by_mask_row = WideDivide(cut.mask_row);
  cut.plane = RowSplit(cut.HxW);
  cut.mask_rows = RowSplit(cut.mask_row);
  cut.padded_rows = RowSplit(cut.padded_row);

  const int64_t bytes = purpose.bytes();
  Cut found{};
  // With units of either width: the workspace is asked for before it is known which.
  const auto shared_bytes = [&](const Cut& of) {
    int64_t most = 0;
    for (const int each : {1, 16 / purpose.size}) {
      Cut whole = of;
      complete(whole, purpose, each, device);
      const int64_t total = plan_shared(whole, purpose, kWidestUnit).total;
      if (total > most) most = total;
    }
    return most;
  };
  const auto fits = [&](int64_t room) {
    Cut whole = cut;  // complete() may find that fewer parts do
    // Nothing so large that its size overflows the plan's integers.
    const int64_t rough = cut.pixels ? ceil_divide(cut.HxW, int64_t{cut.parts}) * cut.width
                                     : ceil_divide(cut.whole * cut.M, int64_t{cut.parts});
    if (rough * bytes > room) return false;
    if (shared_bytes(whole) > room) return false;
    complete(whole, purpose, unit, device);
    found = whole;
    return true;
  };
  int64_t together = 0;  // elements that one block or cluster must hold
  int64_t sets = 0;      // of them in the tensor
  if (cut.pixels) {
    const int64_t step = std::lcm<int64_t>(8, cut.D);
    cut.width = step < cut.C ? step : cut.C;
    while (cut.width < cut.C && cut.width * purpose.size * 2 < kTileBytes) cut.width += step;
    while (cut.width < cut.C && cut.width * cut.HxW * bytes * 2 <= kSmallPart) cut.width *= 2;
    if (cut.width > cut.C) cut.width = cut.C;
    together = cut.width * cut.HxW;
    sets = cut.N * ceil_divide(cut.C, cut.width);
  } else {
    const int64_t most = kSmallPart / (cut.M * bytes);
    const int64_t least = kEnoughPart / (cut.M * bytes);
    cut.whole = clamp<int64_t>(cut.groups / kPiecesWanted, least, most);
    // Parts that begin on whole units read nothing of their neighbours.
    const int64_t even = 8 / std::gcd<int64_t>(cut.M, 8);
    if (even <= most) cut.whole = round_up<int64_t>(cut.whole < 1 ? 1 : cut.whole, even);
    cut.whole = clamp<int64_t>(cut.whole, 1, cut.groups);
    together = cut.M;
    sets = cut.groups;
  }
  cut.resident = true;
  // With two blocks on a multiprocessor one computes while the other waits for memory.
  const int64_t half = clamp<int64_t>(device.shared_of_all / 2 - kReserved, 0, device.shared);
  const int most = cut.whole == 1 && !samples(cut, purpose) ? device.most_cluster : 1;
  const int64_t wanted = 2 * int64_t{device.multiprocessors};
  while (cut.parts < most && (!fits(half) || (sets * cut.parts < wanted &&
                                              together * bytes > cut.parts * kSmallPart))) {
    cut.parts *= 2;
  }
  if (fits(device.shared)) return found;
  cut.resident = false;
  cut.parts = 1;
  cut.whole = 1;
  const int64_t part = kStreamPart < device.shared / 4 ? kStreamPart : device.shared / 4;
  if (cut.pixels) {
    const int64_t tiles = ceil_divide(cut.C, round_up<int64_t>(kTileBytes / purpose.size, 8));
    cut.width = round_up<int64_t>(ceil_divide(cut.C, tiles), 8);
    if (cut.width > cut.C) cut.width = cut.C;
    cut.chunk = clamp<int64_t>(part / (bytes * cut.width), 1, cut.HxW);
    complete(cut, purpose, unit, device);
  } else {
    cut.parts = 2;  // or more
    cut.chunk = 2 * part / bytes;
    do {
      cut.chunk = round_up<int64_t>(cut.chunk / 2, 64);
    } while (shared_bytes(cut) > device.shared && cut.chunk > 64);
    complete(cut, purpose, unit, device);
  }
  return cut;
}

// The places of a block's shared memory.
struct Arena {
  unsigned char* bytes;
  const SharedPlan& plan;

  template <class T>
  BATCHOPS_DEVICE T* tensor(int i) const {
    return reinterpret_cast<T*>(bytes + i * plan.tensor);
  }
  BATCHOPS_DEVICE uint8_t* tails() const { return bytes + plan.tails; }
  BATCHOPS_DEVICE float2* slots() const { return reinterpret_cast<float2*>(bytes + plan.slots); }
  BATCHOPS_DEVICE float2* channels() const {
    return reinterpret_cast<float2*>(bytes + plan.channels);
  }
  // Where sums are by sample there are two rows of them instead, of `count` channels each, so that
  // a thread's neighbours find theirs in other banks.
  BATCHOPS_DEVICE float* channel_sums(int which, int count) const {
    return reinterpret_cast<float*>(bytes + plan.channels) + which * count;
  }
  template <class Coefficients>
  BATCHOPS_DEVICE Coefficients* table() const {
    return reinterpret_cast<Coefficients*>(bytes + plan.table);
  }
  // Of a group's stretches: in the place of the slots.
  BATCHOPS_DEVICE Moments* stretches() const {
    return reinterpret_cast<Moments*>(bytes + plan.slots);
  }
  BATCHOPS_DEVICE float* shifts() const { return reinterpret_cast<float*>(bytes + plan.shifts); }
  BATCHOPS_DEVICE float2* sums() const { return reinterpret_cast<float2*>(bytes + plan.sums); }
  BATCHOPS_DEVICE Moments* moments() const {
    return reinterpret_cast<Moments*>(bytes + plan.moments);
  }
  BATCHOPS_DEVICE Terms* terms() const { return reinterpret_cast<Terms*>(bytes + plan.terms); }

  // Where the part lies, for all that comes after its tensors have been asked for: one thread works
  // it out while they are on their way. It can be read after a barrier.
  template <class Place>
  BATCHOPS_DEVICE void leave_place(const Cut& cut, int64_t piece) const {
    static_assert(sizeof(Place) <= kPlaceBytes);
    if (threadIdx.x == kBlock - 1) *reinterpret_cast<Place*>(bytes + plan.place) = {cut, piece};
  }
  template <class Place>
  BATCHOPS_DEVICE const Place& place() const {
    return *reinterpret_cast<const Place*>(bytes + plan.place);
  }
};

struct Range {
  int begin, end;
};

// sums[row] = Σ of what add() adds over the row, for rows of at most segments · segment elements.
//
//   Range range(int row);                       its elements
//   auto add = of_row(int row);                 once a segment
//   add(std::integral_constant<int, W>, int i, float2& sum);   elements i … i + W - 1
template <int W, class RangeOf, class OfRow>
BATCHOPS_DEVICE void sum_rows(int rows, const RowTeams& teams, RangeOf range, OfRow of_row,
                              float2* slots, float2* sums) {
  const int lane = teams.lanes.lane(static_cast<int>(threadIdx.x));
  const int team = teams.lanes.team(static_cast<int>(threadIdx.x));
  const int step = W << teams.lanes.shift;
  const int total = rows * teams.segments;
  float2* to = teams.segments > 1 ? slots : sums;
  const int before = teams.before_warp();
  for (int first = 0; first + before < total; first += teams.at_once()) {
    const int s = first + team;
    float2 sum = make_float2(0.0f, 0.0f);
    if (s < total) {
      const int row = static_cast<int>(teams.by_segments.quotient(s));
      Range r = range(row);
      r.begin += (s - row * teams.segments) * teams.segment;
      if (r.begin + teams.segment < r.end) r.end = r.begin + teams.segment;
      if (r.begin < r.end) {
        const auto add = of_row(row);
#pragma unroll 1
        for (int i = r.begin + lane * W; i < r.end; i += step) {
          add(std::integral_constant<int, W>{}, i, sum);
        }
      }
    }
    sum = sum_of_lanes(sum, teams.lanes.count());
    if (lane == 0 && s < total) to[s] = sum;
  }
  __syncthreads();
  if (teams.segments == 1) return;
  for (int row = threadIdx.x; row < rows; row += kBlock) {
    float2 sum = slots[row * teams.segments];
    for (int s = 1; s < teams.segments; ++s) {
      sum.x += slots[row * teams.segments + s].x;
      sum.y += slots[row * teams.segments + s].y;
    }
    sums[row] = sum;
  }
  __syncthreads();
}

// ---- from the tensors into shared memory, without a stay in registers: as much as a part holds is
// on its way at once

template <class T, int W>
BATCHOPS_DEVICE void copy_async(T* to, const T* from) {
  constexpr int kBytes = W * static_cast<int>(sizeof(T));
  if constexpr (kBytes >= 4) {
    __pipeline_memcpy_async(to, from, kBytes);
  } else {
    *to = *from;
  }
}
// A thread's own copies have come.
BATCHOPS_DEVICE void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  keep_order();
}

// ---- statistics

BATCHOPS_DEVICE Terms forward_terms(const MeanAndVariance& found, int64_t M, double eps) {
  Terms terms{};
  terms.mean = static_cast<float>(found.mean);
  terms.low = static_cast<float>(found.mean - terms.mean);
  terms.rstd =
      static_cast<float>(inverse_root(found.square * inverse(static_cast<double>(M)) + eps));
  return terms;
}

// f(r, statistics) of each group r of the part, from its get(r, k), k < count_of(r), of
// elements_of(r) elements in all; `lanes` neighbours a group. All threads of the block.
template <class CountOf, class ElementsOf, class Get, class F>
BATCHOPS_DEVICE void merge_groups(int groups, Lanes lanes, CountOf count_of, ElementsOf elements_of,
                                  Get get, F f) {
  const int items = groups << lanes.shift;
#pragma unroll 1
  for (int first = 0; first < items; first += kBlock) {
    const int item = first + static_cast<int>(threadIdx.x);
    if ((item & -kWarp) >= items) break;  // nothing for all of the warp
    const bool active = item < items;
    const int r = active ? lanes.team(item) : 0;
    const int lane = lanes.lane(item);
    const MeanAndVariance found = merge(
        elements_of(r), active ? count_of(r) : 0, lane, lanes.count(),
        [&](int64_t k) { return get(r, static_cast<int>(k)); },
        [&](double value) { return sum_of_lanes(value, lanes.count()); });
    if (active && lane == 0) f(r, found);
  }
}

BATCHOPS_DEVICE Moments as_moments(const MeanAndVariance& found, int64_t count) {
  const auto shift = static_cast<float>(found.mean);
  const double sum = (found.mean - shift) * static_cast<double>(count);
  return {shift, static_cast<float>(sum), static_cast<float>(found.square),
          static_cast<float>(count)};
}

BATCHOPS_DEVICE Terms load_terms(const float* stats, int64_t groups, int64_t group) {
  Terms terms{};
  terms.mean = stats[group];
  terms.low = stats[groups + group];
  terms.rstd = stats[2 * groups + group];
  return terms;
}

// ---- the arithmetic of an element

template <class T>
BATCHOPS_DEVICE AffineOf<T> make_affine_of(const Terms& t, float weight, float bias) {
  return AffineOf<T>(make_affine(t.mean, t.low, t.rstd, weight, bias));
}

// ---- parameters of a channel

struct Affines {
  const void* weight;
  const void* bias;
  DType dtype;
  bool wide;  // both aligned to 16 bytes

  BATCHOPS_DEVICE float weight_of(int64_t c) const {
    return weight != nullptr ? load_as_float(weight, dtype, c) : 1.0f;
  }
  BATCHOPS_DEVICE float bias_of(int64_t c) const {
    return bias != nullptr ? load_as_float(bias, dtype, c) : 0.0f;
  }
  // W channels from c, a multiple of W.
  template <int W>
  BATCHOPS_DEVICE void load(int64_t c, float (&w)[W], float (&b)[W]) const {
    load_row<W>(weight, c, 1.0f, w);
    load_row<W>(bias, c, 0.0f, b);
  }

 private:
  template <class T, int W>
  BATCHOPS_DEVICE static void load_units(const void* from, int64_t c, float (&to)[W]) {
    constexpr int kUnit = W < kWidest<T> ? W : kWidest<T>;
#pragma unroll
    for (int u = 0; u < W / kUnit; ++u) {
      float v[kUnit];
      to_float<T, kUnit>(load_unit<T, kUnit>(static_cast<const T*>(from) + c + u * kUnit), v);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) to[u * kUnit + j] = v[j];
    }
  }
  template <int W>
  BATCHOPS_DEVICE void load_row(const void* from, int64_t c, float absent, float (&to)[W]) const {
    if (from == nullptr) {
#pragma unroll
      for (int j = 0; j < W; ++j) to[j] = absent;
    } else if (!wide) {
#pragma unroll
      for (int j = 0; j < W; ++j) to[j] = load_as_float(from, dtype, c + j);
    } else if (dtype == DType::f16) {
      load_units<__half, W>(from, c, to);
    } else if (dtype == DType::bf16) {
      load_units<__nv_bfloat16, W>(from, c, to);
    } else {
      load_units<float, W>(from, c, to);
    }
  }
};

// f(job), or what of the job knows nothing of a residual and its gradient: so that loops do not ask
// for each element.
template <class Job, class F>
BATCHOPS_DEVICE void by_residual(const Job& job, F f) {
  if constexpr (Job::kSplits) {
    if (job.is_plain()) {
      f(job.plain());
      return;
    }
  }
  f(job);
}

// ---- elements

// Coefficients of the elements of a unit: all alike, or of each.
template <class K>
struct Same {
  const K& k;
  BATCHOPS_DEVICE const K& operator()(int) const { return k; }
};
template <class K>
Same(const K&) -> Same<K>;
template <class K, int W>
struct Each {
  const K (&k)[W];
  BATCHOPS_DEVICE const K& operator()(int j) const { return k[j]; }
};
template <class K, int W>
Each(const K (&)[W]) -> Each<K, W>;

// Elements `valid` of a unit.
template <class T, int W>
BATCHOPS_DEVICE void store_range(T* to, const float (&from)[W], const Range& valid) {
  if (valid.begin == 0 && valid.end == W) {
    store_unit<T, W>(to, from);
    return;
  }
#pragma unroll
  for (int j = 0; j < W; ++j) {
    if (j >= valid.begin && j < valid.end) to[j] = from_float<T>(from[j]);
  }
}

}  // namespace batchops::cuda::group
