// What the batch norm kernels of forward and backward share: how a tensor is cut into pieces of
// work.
//
// A tensor is rows of consecutive elements: planes of HxW in channels_first, pixels of C in
// channels_last. A thread moves units of W consecutive elements of a row (at most 16 bytes), four
// at a time. A ghost batch is some whole samples; statistics belong to a ghost batch and a channel,
// a column of `stats`.
//
// Where what must be seen at once fits on the chip, one kernel does all of it and reads x once
// (batch_norm_residency.cuh). Elsewhere:
//
//   1. partials: a block sums over one chunk of one channel (channels_first) or of up to 256
//      neighbouring channels (channels_last) of a ghost batch and writes a slot for each channel.
//   2. finish: a warp merges a channel's slots in double, in an order that the shape alone fixes.
//      With one chunk a channel, the block of step 1 does it and the launch is saved.
//   3. apply: elementwise over the tensor, back to front, so that what step 1 read last is still
//      in the L2 cache.
//
// Chunks depend on the shape only, not on the device.
#pragma once
#include "kernels/batch_norm.h"
#include "kernels/cuda/norm.cuh"

namespace batchops::cuda {

constexpr int kTileChannels = 256;  // channels_last: a block's share of a row

// Of those that a thread takes at once, how many it loads before it uses the first. AnyActivation
// needs registers itself, and kCrowded says that it finds few.
template <class Act, bool kCrowded = false>
constexpr int kLoadsAhead = !kAnyActivation<Act> ? kInFlight
                            : kCrowded           ? 1
                                                 : 2;

// As merge() of norm.cuh, each lane with several parts on their way at once: where there are many,
// waiting for one after the other is what takes the time. The first ones are on their way before
// the shift is worked out.
template <int kAhead, class Get, class Reduce>
BATCHOPS_DEVICE MeanAndVariance merge_ahead(int64_t M, int64_t count, int lane, int lanes, Get get,
                                            Reduce reduce) {
  Moments parts[kAhead];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = k + int64_t{u} * lanes;
      parts[u] = at < count ? get(at) : Moments{0.0f, 0.0f, 0.0f, 0.0f};
    }
  };
  const Moments first = get(int64_t{0});
  int64_t k = lane;
  load(k);
  const double g =
      static_cast<double>(first.shift) + static_cast<double>(first.sum) * inverse(first.count);
  double sums[2] = {};
  for (;;) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const Moments m = parts[u];
      if (m.count == 0.0f) continue;
      const double n = m.count;
      const double nd = n * (m.shift - g) + m.sum;
      sums[0] += nd;
      sums[1] += m.square + nd * nd * inverse(n);
    }
    k += int64_t{kAhead} * lanes;
    if (k >= count) break;
    load(k);
  }
  reduce(sums);
  const double part = inverse(static_cast<double>(M));
  const double rest = sums[1] - sums[0] * sums[0] * part;
  return {g + sums[0] * part, rest < 0.0 ? 0.0 : rest};  // a NaN stays
}

// A column for a whole block, in all threads.
template <int kAhead, class Get>
BATCHOPS_DEVICE MeanAndVariance merge_in_block(int64_t M, int64_t count, Get get) {
  return merge_ahead<kAhead>(M, count, static_cast<int>(threadIdx.x), kThreads, get,
                             [](double (&sums)[2]) { block_sum<kThreads>(sums); });
}

// ---- host: shapes into work

// channels_last: a block covers `tile` units of a row and as many rows as its threads allow.
//
//   thread t:  row t / tile, unit t % tile   (t ≥ tile · rows_at_once: idle)
struct RowTiles {
  int units = 1;  // of a row
  int tile = 1;
  int tiles = 1;
  int rows_at_once = 1;
  FastDivide by_tile;
  FastDivide by_batch;  // kInFlight · rows_at_once rows

  RowTiles() = default;
  // A tile holds a multiple of `group` units, at most `most` of them.
  RowTiles(int64_t row_units, int most, int group) : units(static_cast<int>(row_units)) {
    tiles = ceil_divide(units, most);
    tile = round_up(ceil_divide(units, tiles), group);
    tiles = ceil_divide(units, tile);
    rows_at_once = kThreads / tile;
    by_tile = FastDivide(static_cast<unsigned>(tile));
    by_batch = FastDivide(static_cast<unsigned>(kInFlight * rows_at_once));
  }

  BATCHOPS_DEVICE int row_of_thread() const {
    return static_cast<int>(by_tile.quotient(threadIdx.x));
  }
  BATCHOPS_DEVICE int batches(unsigned rows) const {
    return static_cast<int>(by_batch.quotient(rows + by_batch.divisor - 1));
  }
};

// The shape as the kernels walk it, and its chunks.
struct Plan {
  Layout layout;
  int64_t N, C, HxW;
  int64_t ghosts;
  int64_t samples, last_samples;  // of a ghost batch, of the last one
  int64_t chunk;                  // elements of a channel (channels_first) or rows (channels_last)
  int64_t chunks, last_chunks;    // of a channel in a ghost batch

  bool channels_last() const { return layout == Layout::channels_last; }
  int64_t per_channel() const { return N * HxW; }
  int64_t rows() const { return channels_last() ? N * HxW : N * C; }
  int64_t row() const { return channels_last() ? C : HxW; }
  int64_t columns() const { return ghosts * C; }
  int64_t slots() const { return (ghosts - 1) * chunks + last_chunks; }  // of a channel
  int64_t most_samples() const { return samples > last_samples ? samples : last_samples; }
};

inline Plan make_plan(const BatchNormShape& shape, bool with_mask) {
  Plan plan{};
  plan.layout = shape.layout;
  plan.N = shape.N;
  plan.C = shape.C;
  plan.HxW = shape.HxW;
  plan.ghosts = shape.ghosts();
  // The same bytes read as longer rows, for wider accesses. Not with a mask, whose rows are padded.
  if (!with_mask && plan.HxW == 1) plan.layout = Layout::channels_last;
  if (!with_mask && plan.C == 1 && plan.ghosts == 1) {
    plan.layout = Layout::channels_first;
    plan.HxW *= plan.N;
    plan.N = 1;
  }
  plan.samples = plan.ghosts > 1 ? shape.ghost : plan.N;
  plan.last_samples = plan.N - (plan.ghosts - 1) * plan.samples;
  const int64_t M = plan.per_channel();
  if (plan.channels_last()) {
    const int64_t tiles = ceil_divide<int64_t>(plan.C, kTileChannels);
    const int64_t wanted = ceil_divide(M, clamp<int64_t>(kPiecesWanted / tiles, 1, kPiecesWanted));
    // Enough rows that writing and reading the slots costs little beside them, and few enough that
    // no float sum gets long.
    const int64_t least = clamp<int64_t>(8192 / plan.C, 128, 1024);
    const int64_t most = clamp<int64_t>(131072 / plan.C, 4096, 65536);
    // Whole batches of the widest units.
    const int64_t widest = shape.dtype == DType::f32 ? 4 : 8;
    const int64_t width = plan.C % widest == 0 ? widest : plan.C % 4 == 0 ? 4 : 1;
    const RowTiles of_block(plan.C / width, static_cast<int>(kTileChannels / width), 1);
    plan.chunk = round_up<int64_t>(clamp(wanted, least, most), kInFlight * of_block.rows_at_once);
  } else {
    const int64_t wanted = ceil_divide(M, clamp<int64_t>(kPiecesWanted / plan.C, 1, kPiecesWanted));
    plan.chunk = round_up<int64_t>(clamp<int64_t>(wanted, 8192, 131072), 2048);
  }
  plan.chunks = ceil_divide(plan.samples * plan.HxW, plan.chunk);
  plan.last_chunks = ceil_divide(plan.last_samples * plan.HxW, plan.chunk);
  return plan;
}

// Neighbouring lanes that share the chunks of one ghost batch in step 2: a block's threads where
// there are many, unless channels alone fill the device with warps.
inline int finish_lanes(const Plan& plan) {
  constexpr int64_t kMany = 2 * kWarp;
  constexpr int64_t kFew = 512;
  if (plan.ghosts == 1 && plan.chunks > kMany && plan.C <= kFew) return kThreads;
  int lanes = 1;
  while (lanes < kWarp && (plan.ghosts == 1 || lanes < plan.chunks)) lanes *= 2;
  return lanes;
}

// Calls f(integral_constant<int, W>) with the widest unit that rows and pointers allow.
template <class T, class F>
const char* dispatch_width(int64_t row, std::initializer_list<const void*> pointers, F&& f) {
  const auto fits = [&](int width) {
    bool aligned = row % width == 0;
    for (const void* p : pointers) {
      aligned = aligned && is_aligned(p, width * static_cast<int>(sizeof(T)));
    }
    return aligned;
  };
  if constexpr (kWidest<T> > 4) {
    if (fits(kWidest<T>)) return f(std::integral_constant<int, kWidest<T>>{});
  }
  if (fits(4)) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 1>{});
}

// Calls f(activation). Where units are narrower than 16 bytes, or `any` is set, one instance serves
// all activations.
template <class T, int W, class F>
const char* dispatch_activation(const BatchNormShape& shape, bool any, F&& f) {
  const float slope = static_cast<float>(shape.slope);
  if constexpr (W == kWidest<T>) {
    if (!any) return with_activation<Identity, Relu>(shape.activation, slope, f);
  }
  return f(AnyActivation{shape.activation, slope});
}

// Cutting for step 1, and for the kernels that do all of it.
struct ChunkGrid {
  int64_t C, HxW;
  int64_t ghosts;
  // Units of a channel (channels_first) or rows (channels_last) of a ghost batch, and of the last.
  int64_t length, last_length;
  int64_t chunk;   // of them
  int64_t chunks;  // of a ghost batch
  int64_t slots;   // chunks of a channel in all
  int64_t across;  // channels (channels_first), tiles of them (channels_last)
  WideDivide by_across;
  int64_t pieces;     // of work
  bool padded;        // rows are walked as if they were as long as the mask's
  unsigned columns;   // units of a row that are elements, where rows are short
  int64_t of_sample;  // elements from a channel's row to that of the next sample
  RowSplit plane;     // channels_first: units of a row
  WideDivide by_plane;
  RowTiles tiles;    // channels_last
  int together = 1;  // channels whose planes are taken together (PlanesChunk)

  ChunkGrid(const Plan& plan, int width)
      : ChunkGrid(plan, width, plan.chunk, plan.chunks, plan.slots(), kTileChannels, 1, false) {}

  // Chunks of so many elements or rows; tiles of at most `tile` channels, where there are several a
  // multiple of `even`.
  ChunkGrid(const Plan& plan, int width, int64_t chunk_size, int64_t of_ghost, int64_t of_channel,
            int tile, int even, bool with_mask)
      : C(plan.C),
        HxW(plan.HxW),
        ghosts(plan.ghosts),
        chunk(chunk_size),
        chunks(of_ghost),
        slots(of_channel),
        across(plan.C),
        padded(with_mask && plan.row() % 8 != 0),
        columns(static_cast<unsigned>(plan.row() / width)),
        of_sample(plan.C * plan.HxW) {
    const int64_t row = (padded ? round_up<int64_t>(plan.row(), 8) : plan.row()) / width;
    int64_t in_sample = plan.HxW;
    if (plan.channels_last()) {
      int group = with_mask ? ceil_divide(8, width) : 1;
      if (row * width > tile && even / width > group) group = even / width;
      tiles = RowTiles(row, tile / width, group);
      across = tiles.tiles;
    } else {
      in_sample = row;
      chunk /= width;
      plane = RowSplit(row);
      by_plane = WideDivide(row);
    }
    length = plan.samples * in_sample;
    last_length = plan.last_samples * in_sample;
    by_across = WideDivide(across);
    pieces = slots * across;
  }

  // channels_first: elements between a set and the next one, of a ghost batch.
  BATCHOPS_DEVICE int64_t of_set() const { return together * HxW; }

  // For PlanesChunk: chunks of so many samples.
  void take_together(const Plan& plan, int width, int channels, int64_t samples) {
    together = channels;
    chunk = samples;
    across = plan.C / channels;
    length = plan.samples;
    last_length = plan.last_samples;
    by_across = WideDivide(across);
    pieces = slots * across;
    padded = false;
    const int64_t units = channels * plan.HxW / width;
    tiles = RowTiles(units, static_cast<int>(units), 1);
  }
};

// channels_first with planes that no unit of `width` elements fits (7 x 7, 14 x 14): planes of so
// many neighbouring channels make whole units. 1 where a plane does, 0 where it takes too much.
inline int planes_together(const Plan& plan, int width) {
  if (plan.channels_last() || plan.HxW % width == 0) return 1;
  if (plan.HxW < width) return 0;
  int together = 1;
  while (together * plan.HxW % width != 0) together *= 2;
  return plan.C % together == 0 && together * plan.HxW <= int64_t{width} * kThreads ? together : 0;
}

// A block of step 3, to ask how many run at once.
inline const LaunchShape kApplyShape{dim3(1, 1, 1), dim3(kThreads, 1, 1), 0};

// Cutting for step 3.
struct ApplyGrid {
  int64_t row;  // elements
  int64_t C;
  int64_t ghosts;
  int64_t length;       // units in the padded tensor (channels_first), rows of a ghost batch
  int64_t last_length;  // channels_last
  int64_t pieces;
  RowSplit split;         // channels_first: units of a padded row
  FastDivide by_C;        // channels_first
  WideDivide ghost_rows;  // channels_first: of a ghost batch but the last
  RowTiles tiles;         // channels_last
  int64_t strands = 1;    // channels_last: pieces of a ghost batch's tile

  // A mask's rows end on whole bytes: then rows are walked as if padded to 8 elements, so that the
  // threads that share a byte are neighbours in a warp. `resident`: blocks that run at once.
  ApplyGrid(const Plan& plan, int width, bool with_mask, int64_t resident)
      : row(plan.row()), C(plan.C), ghosts(plan.ghosts) {
    const int64_t padded = (with_mask ? round_up<int64_t>(row, 8) : row) / width;
    if (plan.channels_last()) {
      length = plan.samples * plan.HxW;
      last_length = plan.last_samples * plan.HxW;
      tiles = RowTiles(padded, kTileChannels / width, with_mask ? ceil_divide(8, width) : 1);
      const int64_t longest = length > last_length ? length : last_length;
      const int64_t batches = ceil_divide(longest, batch());
      // As many as run at once, with all of them at one ghost batch; but no shorter than pays for
      // the coefficients, unless that would leave some of the device without work.
      const int64_t most = clamp<int64_t>(resident / tiles.tiles, 1, batches);
      const int64_t least = clamp<int64_t>(resident / (tiles.tiles * ghosts), 1, batches);
      strands = clamp<int64_t>(batches / kBatchesWanted, least, most);
      strands = ceil_divide(batches, ceil_divide(batches, strands));
      pieces = ghosts * strands * tiles.tiles;
    } else {
      length = plan.rows() * padded;
      split = RowSplit(padded);
      by_C = FastDivide(static_cast<unsigned>(plan.C));
      ghost_rows = WideDivide(plan.samples * plan.C);
      pieces = ceil_divide<int64_t>(length, kInFlight * kThreads);
    }
  }

  // channels_last: rows that a block takes at once.
  __host__ __device__ int64_t batch() const { return int64_t{kInFlight} * tiles.rows_at_once; }

 private:
  static constexpr int64_t kBatchesWanted = 8;
};

// ---- device: pieces of work into elements

// Where a chunk lies.
struct ChunkPlace {
  int64_t across;  // its channel, or tile of channels
  int64_t slot;    // among its channel's
  int64_t ghost;
  int64_t begin;  // in units of a channel, rows
  unsigned length;

  BATCHOPS_DEVICE ChunkPlace(const ChunkGrid& grid, int64_t piece) : ghost(0) {
    slot = grid.by_across.quotient(piece);
    across = piece - slot * grid.across;
    int64_t index = slot;  // in the ghost batch
    if (grid.ghosts > 1) {
      ghost = slot / grid.chunks;
      if (ghost >= grid.ghosts) ghost = grid.ghosts - 1;
      index -= ghost * grid.chunks;
    }
    lie(grid, index);
  }
  // Of a ghost batch's chunks the `index`-th.
  BATCHOPS_DEVICE ChunkPlace(const ChunkGrid& grid, int64_t of, int64_t of_ghost, int64_t index)
      : across(of), slot(of_ghost * grid.chunks + index), ghost(of_ghost) {
    lie(grid, index);
  }

 private:
  BATCHOPS_DEVICE void lie(const ChunkGrid& grid, int64_t index) {
    const int64_t from = index * grid.chunk;
    const int64_t left = (ghost + 1 == grid.ghosts ? grid.last_length : grid.length) - from;
    begin = ghost * grid.length + from;
    length = static_cast<unsigned>(left < 0 ? 0 : left < grid.chunk ? left : grid.chunk);
  }
};

// One chunk, as one thread sees it. kChannels: how many channels the thread sums for.
template <Layout kLayout, int W>
struct Chunk;

template <int W>
struct Chunk<Layout::channels_first, W> {
  static constexpr int kWidth = W;
  static constexpr int kChannels = 1;
  static constexpr int kAtOnce = W;           // elements of a unit that are worked on together
  static constexpr int kMostChannels = 1;     // of a block
  static constexpr bool kTellsFirst = false;  // there is holds(), for less than place()
  const ChunkGrid& grid;
  ChunkPlace at;
  int64_t first_plane, first_column;

  BATCHOPS_DEVICE Chunk(const ChunkGrid& g, int64_t piece) : Chunk(g, ChunkPlace(g, piece)) {}
  BATCHOPS_DEVICE Chunk(const ChunkGrid& g, const ChunkPlace& place) : grid(g), at(place) {
    first_plane = g.by_plane.quotient(at.begin);
    first_column = at.begin - first_plane * g.plane.units;
  }

  BATCHOPS_DEVICE int64_t count() const { return elements(at.length); }
  BATCHOPS_DEVICE int64_t first_count() const {
    constexpr unsigned kFirst = kInFlight * kThreads;
    return elements(at.length < kFirst ? at.length : kFirst);
  }
  BATCHOPS_DEVICE int batches() const {
    return static_cast<int>(ceil_divide<unsigned>(at.length, kInFlight * kThreads));
  }
  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const unsigned t = (batch * kInFlight + u) * kThreads + threadIdx.x;
    unsigned plane;
    int64_t column;
    grid.plane.step(first_column, t, plane, column);
    const int64_t row = (first_plane + plane) * grid.C + at.across;
    column *= W;
    return {row * grid.HxW + column, row, column,
            t < at.length && (!grid.padded || column < grid.HxW)};
  }
  // Whether all units of this batch are valid.
  BATCHOPS_DEVICE bool is_full(int batch) const {
    return !grid.padded && (batch + 1u) * (kInFlight * kThreads) <= at.length;
  }
  static constexpr bool active = true;
  BATCHOPS_DEVICE int64_t first_channel() const { return at.across; }
  BATCHOPS_DEVICE int channels() const { return 1; }  // of the block
  // Of the block's channels, the thread's j-th.
  BATCHOPS_DEVICE int local(int) const { return 0; }
  BATCHOPS_DEVICE bool has_channel(int) const { return true; }
  // Whether this thread writes results: any, those of its j-th channel.
  BATCHOPS_DEVICE bool writes_any() const { return threadIdx.x == 0; }
  BATCHOPS_DEVICE bool writes(int) const { return writes_any(); }

  struct Scratch {};
  template <bool, int kValues>
  BATCHOPS_DEVICE void sum(float (&values)[kValues][1], Scratch&) const {
    float flat[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) flat[i] = values[i][0];
    block_sum<kThreads>(flat);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i][0] = flat[i];
  }

 private:
  // Of the first units: where rows are padded, not all of these are elements.
  BATCHOPS_DEVICE int64_t elements(unsigned units) const {
    if (!grid.padded) return int64_t{units} * W;
    return elements_before(at.begin + units) - elements_before(at.begin);
  }
  BATCHOPS_DEVICE int64_t elements_before(int64_t unit) const {
    const int64_t rows = unit / grid.plane.units;
    const int64_t rest = (unit - rows * grid.plane.units) * W;
    return rows * grid.HxW + (rest < grid.HxW ? rest : grid.HxW);
  }
};

template <int W>
struct Chunk<Layout::channels_last, W> {
  static constexpr int kWidth = W;
  static constexpr int kChannels = W;
  static constexpr int kAtOnce = W == 8 ? 4 : W;
  static constexpr int kMostChannels = kTileChannels;
  static constexpr bool kTellsFirst = true;
  const ChunkGrid& grid;
  ChunkPlace at;
  int row_of_block, unit, column;
  int64_t start, step;  // elements before the thread's first unit, from one to the next
  bool active;

  BATCHOPS_DEVICE Chunk(const ChunkGrid& g, int64_t piece) : grid(g), at(g, piece) {
    const RowTiles& tiles = g.tiles;
    row_of_block = tiles.row_of_thread();
    unit = static_cast<int>(threadIdx.x) - row_of_block * tiles.tile;
    column = (static_cast<int>(at.across) * tiles.tile + unit) * W;
    start = (at.begin + row_of_block) * g.C + column;
    step = tiles.rows_at_once * g.C;
    active = row_of_block < tiles.rows_at_once && column < grid.C;
  }

  BATCHOPS_DEVICE int64_t count() const { return at.length; }
  BATCHOPS_DEVICE int64_t first_count() const {
    const unsigned first = kInFlight * grid.tiles.rows_at_once;
    return at.length < first ? at.length : first;
  }
  BATCHOPS_DEVICE int batches() const { return grid.tiles.batches(at.length); }
  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const unsigned r = (batch * kInFlight + u) * grid.tiles.rows_at_once + row_of_block;
    const int64_t offset = start + batch * (kInFlight * step) + u * step;
    return {offset, at.begin + r, column, active && r < at.length};
  }
  BATCHOPS_DEVICE bool holds(int batch, int u) const {
    const unsigned r = (batch * kInFlight + u) * grid.tiles.rows_at_once + row_of_block;
    return active && r < at.length;
  }
  // Whether all units of this batch are valid in the threads that are active; of the others' sums
  // nobody takes notice.
  BATCHOPS_DEVICE bool is_full(int batch) const {
    return (batch + 1) * grid.tiles.by_batch.divisor <= at.length;
  }
  BATCHOPS_DEVICE int64_t first_channel() const { return at.across * grid.tiles.tile * W; }
  BATCHOPS_DEVICE int channels() const {
    const int64_t left = grid.C - first_channel();
    const int most = grid.tiles.tile * W;
    return left < most ? static_cast<int>(left) : most;
  }
  BATCHOPS_DEVICE int local(int j) const { return unit * W + j; }
  BATCHOPS_DEVICE bool has_channel(int) const { return active; }
  BATCHOPS_DEVICE bool writes_any() const { return active && row_of_block == 0; }
  BATCHOPS_DEVICE bool writes(int) const { return writes_any(); }

  // Neighbouring values of a thread.
  static constexpr int kGroup = W % 4 == 0 ? 4 : 1;
  struct alignas(4 * kGroup) Group {
    float of[kGroup];
  };
  struct Scratch {
    Group by_thread[2 * W / kGroup][kThreads];
  };
  // Over the block's rows, up to kRows of them by a thread at a time; then for each thread those of
  // its columns, or (not kAll) for each that writes.
  template <bool kAll, int kValues>
  BATCHOPS_DEVICE void sum(float (&values)[kValues][W], Scratch& scratch) const {
    static_assert(kValues <= 2);
    constexpr int kGroups = kValues * W / kGroup;
    constexpr int kRows = 8;
    const int tile = forgotten(grid.tiles.tile);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Group group;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        group.of[j] = values[(i * kGroup + j) / W][(i * kGroup + j) % W];
      }
      scratch.by_thread[i][threadIdx.x] = group;
    }
    for (int height = forgotten(grid.tiles.rows_at_once); height > 1;) {
      int shift = 0;
      while (kRows << shift < height) ++shift;
      __syncthreads();
      // Rows that are added belong to one thread, who leaves their sum in the first.
      const int items = row_of_block < grid.tiles.rows_at_once ? kGroups << shift : 0;
#pragma unroll 1
      for (int item = row_of_block; item < items; item += grid.tiles.rows_at_once) {
        const int first = item & ((1 << shift) - 1);
        Group* const column = scratch.by_thread[item >> shift] + unit;
        Group sum = column[first * tile];
#pragma unroll
        for (int k = 1; k < kRows; ++k) {
          const int row = first + (k << shift);
          if (row >= height) continue;
          const Group more = column[row * tile];
#pragma unroll
          for (int j = 0; j < kGroup; ++j) sum.of[j] += more.of[j];
        }
        column[first * tile] = sum;
      }
      height = 1 << shift;
    }
    __syncthreads();
    if (kAll || writes_any()) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const Group group = scratch.by_thread[i][unit];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          values[(i * kGroup + j) / W][(i * kGroup + j) % W] = group.of[j];
        }
      }
    }
    __syncthreads();
  }
};

// channels_first where sets flow: then rows have less than 2^30 units.
template <int W>
struct FlowChunk : Chunk<Layout::channels_first, W> {
  static constexpr bool kTellsFirst = true;
  int64_t start;  // the first unit's row, if it began there

  BATCHOPS_DEVICE FlowChunk(const ChunkGrid& g, const ChunkPlace& place)
      : Chunk<Layout::channels_first, W>(g, place) {
    start = (this->first_plane * g.C + this->at.across) * g.HxW;
  }

  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const ChunkGrid& grid = this->grid;
    const unsigned t = (batch * kInFlight + u) * kThreads + threadIdx.x;
    unsigned plane, column;
    grid.plane.step(static_cast<unsigned>(this->first_column), t, plane, column);
    return {start + plane * grid.of_sample + column * unsigned{W},
            (this->first_plane + plane) * grid.C + this->at.across, int64_t{column} * W,
            t < this->at.length && column < grid.columns};
  }
  // Whether place() will be valid.
  BATCHOPS_DEVICE bool holds(int batch, int u) const {
    const unsigned t = (batch * kInFlight + u) * kThreads + threadIdx.x;
    return this->grid.padded ? place(batch, u).valid : t < this->at.length;
  }
};

// Planes of neighbouring channels taken together: a row of whole units in each sample, of which a
// thread has one, in every few samples. The chunk's length is in samples, its tile those channels.
template <int W>
struct PlanesChunk {
  static constexpr int kWidth = W;
  static constexpr int kChannels = W;  // an element each, of one of two channels
  static constexpr int kAtOnce = W == 8 ? 4 : W;
  static constexpr int kMostChannels = kThreads / kWarp;
  static constexpr bool kTellsFirst = false;
  const ChunkGrid& grid;
  ChunkPlace at;
  int row_of_block, unit;
  int first, split;  // of its elements' channels; those from `split` on belong to the next one
  bool active;

  BATCHOPS_DEVICE PlanesChunk(const ChunkGrid& g, const ChunkPlace& place) : grid(g), at(place) {
    const int plane = static_cast<int>(g.HxW);
    row_of_block = static_cast<int>(threadIdx.x) / g.tiles.tile;
    unit = static_cast<int>(threadIdx.x) - row_of_block * g.tiles.tile;
    first = unit * W / plane;
    split = (first + 1) * plane - unit * W;
    active = row_of_block < g.tiles.rows_at_once;
  }

  BATCHOPS_DEVICE int64_t count() const { return at.length * grid.HxW; }
  BATCHOPS_DEVICE int64_t first_count() const {
    const unsigned most = kInFlight * grid.tiles.rows_at_once;
    return (at.length < most ? at.length : most) * grid.HxW;
  }
  BATCHOPS_DEVICE int batches() const {
    return static_cast<int>(ceil_divide<unsigned>(at.length, kInFlight * grid.tiles.rows_at_once));
  }
  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const unsigned r = (batch * kInFlight + u) * grid.tiles.rows_at_once + row_of_block;
    const int plane = static_cast<int>(grid.HxW);
    const int64_t row = (at.begin + r) * grid.C + first_channel();
    return {row * plane + unit * W, row + first, unit * W - first * plane, active && r < at.length};
  }
  BATCHOPS_DEVICE int channels() const { return grid.together; }
  BATCHOPS_DEVICE int64_t first_channel() const { return at.across * grid.together; }
  BATCHOPS_DEVICE int local(int j) const { return j < split ? first : first + 1; }
  BATCHOPS_DEVICE bool writes_any() const { return row_of_block == 0; }
  // The thread whose j-th element is the first of its channel.
  BATCHOPS_DEVICE bool writes(int j) const {
    return row_of_block == 0 && (j == split || (j == 0 && unit * W == first * grid.HxW));
  }

  struct Scratch {
    float parts[2][2][kThreads];  // of a thread's two channels
    float totals[2][kMostChannels];
  };
  template <bool, int kValues>
  BATCHOPS_DEVICE void sum(float (&values)[kValues][W], Scratch& scratch) const {
    static_assert(kValues <= 2);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      float of[2] = {};
#pragma unroll
      for (int j = 0; j < W; ++j) {
        of[0] += j < split ? values[i][j] : 0.0f;
        of[1] += j < split ? 0.0f : values[i][j];
      }
      scratch.parts[i][0][threadIdx.x] = of[0];
      scratch.parts[i][1][threadIdx.x] = of[1];
    }
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x) / kWarp;
    const int plane = static_cast<int>(grid.HxW);
    if (c < grid.together) {
      const int from = c * plane / W;
      const int units = ((c + 1) * plane - 1) / W - from + 1;
      float sums[kValues] = {};
      for (int row = 0; row < grid.tiles.rows_at_once; ++row) {
        for (int k = static_cast<int>(threadIdx.x) % kWarp; k < units; k += kWarp) {
          const int t = row * grid.tiles.tile + from + k;
          const int second = (from + k) * W < c * plane ? 1 : 0;
#pragma unroll
          for (int i = 0; i < kValues; ++i) sums[i] += scratch.parts[i][second][t];
        }
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        sums[i] = warp_sum(sums[i]);
        if (threadIdx.x % kWarp == 0) scratch.totals[i][c] = sums[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float own = scratch.totals[i][first];
      const float next = split < W ? scratch.totals[i][first + 1] : 0.0f;
#pragma unroll
      for (int j = 0; j < W; ++j) values[i][j] = j < split ? own : next;
    }
    __syncthreads();
  }
};

// Calls use(place), where place() tells where the unit is, if there is one; says whether.
template <class MyChunk, class Use>
BATCHOPS_DEVICE bool use_unit(const MyChunk& chunk, int batch, int u, Use&& use) {
  if constexpr (MyChunk::kTellsFirst) {
    if (!chunk.holds(batch, u)) return false;
    use([&] { return chunk.place(batch, u); });
  } else {
    const Place place = chunk.place(batch, u);
    if (!place.valid) return false;
    use([&] { return place; });
  }
  return true;
}

// One piece of step 3, a batch of kInFlight units a thread after the other:
//   for (Piece<kLayout, W> piece(grid, i); piece.more(); piece.next()) … piece.place(u, …)
// In channels_last a thread stays with its channels, so that their coefficients are loaded once.
template <Layout kLayout, int W>
struct Piece;

template <int W>
struct Piece<Layout::channels_first, W> {
  const ApplyGrid& grid;
  static constexpr bool active = true;
  int64_t begin, first_row, first_column;
  unsigned first_channel;

  BATCHOPS_DEVICE Piece(const ApplyGrid& g, int64_t piece) : grid(g) {
    begin = piece * (kInFlight * kThreads);
    first_row = begin / g.split.units;
    first_column = begin - first_row * g.split.units;
    first_channel = static_cast<unsigned>(first_row % g.C);
  }
  BATCHOPS_DEVICE bool more() const { return begin >= 0; }
  BATCHOPS_DEVICE void next() { begin = -1; }
  // `of_stats`: the unit's column of the statistics.
  BATCHOPS_DEVICE Place place(int u, int64_t& of_stats) const {
    const unsigned t = u * kThreads + threadIdx.x;
    unsigned row;
    int64_t column;
    grid.split.step(first_column, t, row, column);
    const unsigned c = first_channel + row;
    of_stats = c - grid.by_C.quotient(c) * grid.by_C.divisor;
    if (grid.ghosts > 1) {
      const int64_t ghost = grid.ghost_rows.quotient(first_row + row);
      of_stats += (ghost < grid.ghosts ? ghost : grid.ghosts - 1) * grid.C;
    }
    column *= W;
    return {(first_row + row) * grid.row + column, first_row + row, column,
            begin + t < grid.length && column < grid.row};
  }
};

// Every strands-th batch of rows of a ghost batch, from its end on: so all blocks move together
// from the tensor's end to its start.
template <int W>
struct Piece<Layout::channels_last, W> {
  const ApplyGrid& grid;
  int64_t first_of_stats;  // of the thread's channels, a column of the statistics
  int64_t batch;           // at hand, of the ghost batch's; below 0: past the last one
  int64_t row, offset;     // of the thread's first unit in it
  int64_t length, end;     // of the ghost batch's rows
  int column;
  bool active;

  BATCHOPS_DEVICE Piece(const ApplyGrid& g, int64_t piece) : grid(g) {
    const RowTiles& tiles = g.tiles;
    int64_t strand = piece / tiles.tiles;
    const int tile = static_cast<int>(piece - strand * tiles.tiles);
    int64_t ghost = 0;
    if (g.ghosts > 1) {
      ghost = strand / g.strands;
      strand -= ghost * g.strands;
    }
    const int64_t first = ghost * g.length;
    length = ghost + 1 == g.ghosts ? g.last_length : g.length;
    end = first + length;
    batch = ceil_divide(length, g.batch()) - g.strands + strand;
    const int row_of_block = tiles.row_of_thread();
    const int unit = static_cast<int>(threadIdx.x) - row_of_block * tiles.tile;
    column = (tile * tiles.tile + unit) * W;
    first_of_stats = ghost * g.C + column;
    active = row_of_block < tiles.rows_at_once && column < g.row;
    row = first + batch * g.batch() + row_of_block;
    offset = row * g.row + column;
  }
  BATCHOPS_DEVICE bool more() const { return batch >= 0; }
  // Whether all units of the batch are valid in the threads that are active.
  BATCHOPS_DEVICE bool is_full() const { return (batch + 1) * grid.batch() <= length; }
  BATCHOPS_DEVICE void next() {
    const int64_t rows = grid.strands * grid.batch();
    batch -= grid.strands;
    row -= rows;
    offset -= rows * grid.row;
  }
  BATCHOPS_DEVICE Place place(int u, int64_t&) const {
    const int64_t rows = int64_t{u} * grid.tiles.rows_at_once;
    return {offset + rows * grid.row, row + rows, column, active && row + rows < end};
  }
};

// Calls take(ahead, full, first) for the units of a piece, so many ahead from the first of each
// batch; where `full` says so, none has to be asked whether it is valid.
template <Layout kLayout, int kAhead, bool kNeverFull, class MyPiece, class Take>
BATCHOPS_DEVICE void take_all(MyPiece& piece, Take take) {
  constexpr bool kMayBeFull = kLayout == Layout::channels_last && !kNeverFull;
  constexpr std::integral_constant<int, kAhead> ahead{};
  for (; piece.more(); piece.next()) {
    if constexpr (kMayBeFull) {
      if (piece.is_full()) {
        static_assert(kAhead == kInFlight);
        take(ahead, std::true_type{}, 0);
      } else {
#pragma unroll 1
        for (int u = 0; u < kInFlight; ++u) {
          take(std::integral_constant<int, 1>{}, std::false_type{}, u);
        }
      }
    } else {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) take(ahead, std::false_type{}, part);
    }
  }
}

// Numbers of a tile's channels in shared memory, for threads with eight channels each: four at a
// time, so that neighbours find theirs in different banks.
template <int kFields, int kTile>
class FieldTable {
 public:
  static constexpr int kAtOnce = 4;

  BATCHOPS_DEVICE void set(int channel, const float (&fields)[kFields]) {
    const int unit = channel / (2 * kAtOnce);
    const int half = channel / kAtOnce % 2;
#pragma unroll
    for (int k = 0; k < kFields; ++k) {
      reinterpret_cast<float*>(&values_[k][half][unit])[channel % kAtOnce] = fields[k];
    }
  }
  BATCHOPS_DEVICE void get(int field, int unit, int half, float (&to)[kAtOnce]) const {
    const float4 four = values_[field][half][unit];
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  }

 private:
  float4 values_[kFields][2][kTile / (2 * kAtOnce)];
};

// What scales an element; the mean where it is not folded.
template <class T, int kTile>
class AffineTable {
  using Fields = FieldTable<kFolded<T> ? 2 : 3, kTile>;
  Fields fields_;

 public:
  static constexpr int kAtOnce = Fields::kAtOnce;

  BATCHOPS_DEVICE void set(int channel, const AffineOf<T>& a) {
    if constexpr (kFolded<T>) {
      fields_.set(channel, {a.scale, a.shift});
    } else {
      fields_.set(channel, {a.scale, a.shift, a.mean});
    }
  }
  BATCHOPS_DEVICE void get(int unit, int half, AffineOf<T> (&to)[kAtOnce]) const {
    float scale[kAtOnce], shift[kAtOnce], mean[kAtOnce] = {};
    fields_.get(0, unit, half, scale);
    fields_.get(1, unit, half, shift);
    if constexpr (!kFolded<T>) fields_.get(2, unit, half, mean);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      to[j].mean = mean[j];
      to[j].scale = scale[j];
      to[j].shift = shift[j];
    }
  }
};

struct Parameters {
  const void* weight;
  const void* bias;
  DType dtype;

  struct Pair {
    float weight, bias;

    BATCHOPS_DEVICE Affine affine(float mean, float mean_low, float rstd) const {
      return make_affine(mean, mean_low, rstd, weight, bias);
    }
  };
  BATCHOPS_DEVICE Pair of(int64_t c) const {
    return {weight ? load_as_float(weight, dtype, c) : 1.0f,
            bias ? load_as_float(bias, dtype, c) : 0.0f};
  }
};

// ---- the mask

// The byte that has a unit's bits. Rows of units of 8 are no longer than the mask's.
template <int W>
BATCHOPS_DEVICE int64_t byte_of_mask(int64_t row_bytes, const Place& place) {
  return W == 8 ? place.offset / 8 : place.row * row_bytes + place.column / 8;
}

// Bit j of the result belongs to element j of the unit.
template <int W>
BATCHOPS_DEVICE unsigned load_mask(const uint8_t* mask, int64_t row_bytes, const Place& place) {
  const unsigned bits = mask[byte_of_mask<W>(row_bytes, place)];
  return W == 8 ? bits : bits >> (place.column % 8);
}

// All lanes of the warp must call it, those without an element too.
template <int W>
BATCHOPS_DEVICE void store_mask(uint8_t* mask, int64_t row_bytes, const Place& place,
                                unsigned bits) {
  store_mask_byte<W>(mask + byte_of_mask<W>(row_bytes, place),
                     place.valid && (W == 8 || place.column % 8 == 0), bits);
}

}  // namespace batchops::cuda
