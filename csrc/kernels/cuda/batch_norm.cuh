// What the batch norm kernels of forward and backward share: how a tensor is cut into pieces of
// work, and the per-channel arithmetic that both must do alike.
//
// A tensor is rows of consecutive elements: planes of HxW in channels_first, pixels of C in
// channels_last. A thread moves units of W consecutive elements of a row (at most 16 bytes), four
// at a time.
//
//   1. partials: a block sums over one chunk of one channel (channels_first) or of up to 256
//      neighbouring channels (channels_last) and writes one slot per channel and chunk.
//   2. finish: a warp merges a channel's slots in double, in an order that the shape alone fixes.
//      With one chunk a channel, the block of step 1 does it and the launch is saved.
//   3. apply: elementwise over the tensor, back to front, so that what step 1 read last is still
//      in the L2 cache.
//
// Chunks depend on the shape only, not on the device: every GPU gives the same bits.
#pragma once
#include "kernels/batch_norm.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/fast_divide.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace batchops::cuda {

constexpr int kThreads = 256;
constexpr int kLeastResident = 2;        // blocks on a multiprocessor: up to 128 registers a thread
constexpr int kInFlight = 4;             // units a thread takes at once
constexpr int kTileChannels = 256;       // channels_last: a block's share of a row
constexpr int64_t kPiecesWanted = 1024;  // about a wave of blocks on the largest GPUs

// Of those, how many it loads before it uses the first. AnyActivation needs registers itself, and
// kCrowded says that it finds few.
template <class Act, bool kCrowded = false>
constexpr int kLoadsAhead = !kAnyActivation<Act> ? kInFlight
                            : kCrowded           ? 1
                                                 : 2;

template <class T>
__host__ __device__ constexpr T ceil_divide(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
constexpr T round_up(T a, T b) {
  return ceil_divide(a, b) * b;
}
template <class T>
constexpr T clamp(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}

// ---- host: shapes into work

// The shape as the kernels walk it, and its chunks.
struct Plan {
  Layout layout;
  int64_t N, C, HxW;
  int64_t chunk;   // elements of a channel (channels_first) or rows (channels_last)
  int64_t chunks;  // for each channel

  bool channels_last() const { return layout == Layout::channels_last; }
  int64_t per_channel() const { return N * HxW; }
  int64_t rows() const { return channels_last() ? N * HxW : N * C; }
  int64_t row() const { return channels_last() ? C : HxW; }
};

inline Plan make_plan(const BatchNormShape& shape, bool with_mask) {
  Plan plan{shape.layout, shape.N, shape.C, shape.HxW, 0, 0};
  // The same bytes read as longer rows, for wider accesses. Not with a mask, whose rows are padded.
  if (!with_mask && plan.HxW == 1) plan.layout = Layout::channels_last;
  if (!with_mask && plan.C == 1) {
    plan.layout = Layout::channels_first;
    plan.HxW *= plan.N;
    plan.N = 1;
  }
  const int64_t M = plan.per_channel();
  if (plan.channels_last()) {
    const int64_t tiles = ceil_divide<int64_t>(plan.C, kTileChannels);
    const int64_t wanted = ceil_divide(M, clamp<int64_t>(kPiecesWanted / tiles, 1, kPiecesWanted));
    // Enough rows that writing and reading the slots costs little beside them, and few enough that
    // no float sum gets long.
    const int64_t least = clamp<int64_t>(8192 / plan.C, 128, 1024);
    const int64_t most = clamp<int64_t>(131072 / plan.C, 4096, 65536);
    plan.chunk = round_up<int64_t>(clamp(wanted, least, most), 16);
  } else {
    const int64_t wanted = ceil_divide(M, clamp<int64_t>(kPiecesWanted / plan.C, 1, kPiecesWanted));
    plan.chunk = round_up<int64_t>(clamp<int64_t>(wanted, 8192, 131072), 2048);
  }
  plan.chunks = ceil_divide(M, plan.chunk);
  return plan;
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

template <class F>
const char* dispatch_layout(Layout layout, F&& f) {
  if (layout == Layout::channels_first) {
    return f(std::integral_constant<Layout, Layout::channels_first>{});
  }
  return f(std::integral_constant<Layout, Layout::channels_last>{});
}

// Blocks for `pieces` of work; a block takes every gridDim.x-th piece.
inline const char* grid_size(const char* operation, int device, int64_t pieces, int64_t& blocks) {
  constexpr int64_t kBlocksPerMultiprocessor = 64;  // 8 fit at once: the last wave stays short
  int multiprocessors = 0;
  const char* error =
      check(operation, "cudaDeviceGetAttribute",
            cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  blocks = clamp<int64_t>(pieces, 1, kBlocksPerMultiprocessor * multiprocessors);
  return error;
}

// channels_last: a block covers `tile` units of a row and as many rows as its threads allow.
//
//   thread t:  row t / tile, unit t % tile   (t ≥ tile · rows_at_once: idle)
struct RowTiles {
  int units = 1;  // of a row
  int tile = 1;
  int tiles = 1;
  int rows_at_once = 1;

  RowTiles() = default;
  // A tile holds a multiple of `group` units.
  RowTiles(int64_t row_units, int width, int group) : units(static_cast<int>(row_units)) {
    const int most = kTileChannels / width;
    tiles = ceil_divide(units, most);
    tile = round_up(ceil_divide(units, tiles), group);
    tiles = ceil_divide(units, tile);
    rows_at_once = kThreads / tile;
  }
};

// Cutting for step 1.
struct ChunkGrid {
  int64_t C, HxW;
  int64_t length;  // units of a channel (channels_first), rows (channels_last)
  int64_t chunk;   // of them
  int64_t chunks;
  int64_t pieces;  // of work
  RowSplit plane;  // channels_first
  RowTiles tiles;  // channels_last

  ChunkGrid(const Plan& plan, int width) : C(plan.C), HxW(plan.HxW), chunks(plan.chunks) {
    if (plan.channels_last()) {
      length = plan.rows();
      chunk = plan.chunk;
      tiles = RowTiles(plan.C / width, width, 1);
      pieces = chunks * tiles.tiles;
    } else {
      length = plan.per_channel() / width;
      chunk = plan.chunk / width;
      plane = RowSplit(plan.HxW / width);
      pieces = chunks * plan.C;
    }
  }
};

// Cutting for step 3.
struct ApplyGrid {
  int64_t row;     // elements
  int64_t length;  // units in the padded tensor (channels_first), rows (channels_last)
  int64_t pieces;
  RowSplit split;   // channels_first: units of a padded row
  FastDivide by_C;  // channels_first
  RowTiles tiles;   // channels_last
  int batches = 1;  // channels_last: times kInFlight · rows_at_once rows a piece

  // A mask's rows end on whole bytes: then rows are walked as if padded to 8 elements, so that the
  // threads that share a byte are neighbours in a warp.
  ApplyGrid(const Plan& plan, int width, bool with_mask) : row(plan.row()) {
    const int64_t padded = (with_mask ? round_up<int64_t>(row, 8) : row) / width;
    if (plan.channels_last()) {
      length = plan.rows();
      tiles = RowTiles(padded, width, with_mask ? 8 / width : 1);
      const int64_t batch = int64_t{kInFlight} * tiles.rows_at_once;
      const int64_t all = ceil_divide(length, batch) * tiles.tiles;
      batches = static_cast<int>(clamp<int64_t>(all / (4 * kPiecesWanted), 1, 8));
      pieces = ceil_divide(length, batch * batches) * tiles.tiles;
    } else {
      length = plan.rows() * padded;
      split = RowSplit(padded);
      by_C = FastDivide(static_cast<unsigned>(plan.C));
      pieces = ceil_divide<int64_t>(length, kInFlight * kThreads);
    }
  }
};

// ---- device: pieces of work into elements

// Where a unit lies: element `offset` of the tensor, elements column … column + W - 1 of its row.
struct Place {
  int64_t offset;
  int64_t row;
  int64_t column;
  bool valid;
};

// One chunk of step 1, as one thread sees it. kChannels: how many channels the thread sums for.
template <Layout kLayout, int W>
struct Chunk;

template <int W>
struct Chunk<Layout::channels_first, W> {
  static constexpr int kChannels = 1;
  const ChunkGrid& grid;
  int64_t index;  // of the chunk in its channel
  int64_t channel;
  unsigned units;  // of the chunk
  int64_t first_plane, first_column;

  BATCHOPS_DEVICE Chunk(const ChunkGrid& g, int64_t piece) : grid(g) {
    index = piece / g.C;
    channel = piece - index * g.C;
    const int64_t begin = index * g.chunk;
    const int64_t left = g.length - begin;
    units = static_cast<unsigned>(left < g.chunk ? left : g.chunk);
    first_plane = begin / g.plane.units;
    first_column = begin - first_plane * g.plane.units;
  }

  BATCHOPS_DEVICE int64_t count() const { return int64_t{units} * W; }
  BATCHOPS_DEVICE int64_t first_count() const {
    constexpr unsigned kFirst = kInFlight * kThreads;
    return int64_t{units < kFirst ? units : kFirst} * W;
  }
  BATCHOPS_DEVICE int batches() const {
    return static_cast<int>(ceil_divide<unsigned>(units, kInFlight * kThreads));
  }
  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const unsigned t = (batch * kInFlight + u) * kThreads + threadIdx.x;
    unsigned plane;
    int64_t column;
    grid.plane.step(first_column, t, plane, column);
    const int64_t row = (first_plane + plane) * grid.C + channel;
    return {row * grid.HxW + column * W, row, column * W, t < units};
  }
  BATCHOPS_DEVICE int64_t channel_of(int) const { return channel; }
  BATCHOPS_DEVICE bool has_channel() const { return true; }
  // Whether this thread writes the results: sums() leaves them in all.
  BATCHOPS_DEVICE bool writes() const { return threadIdx.x == 0; }

  struct Scratch {};
  template <int kValues>
  BATCHOPS_DEVICE void sum(float (&values)[kValues][1], Scratch&) const {
    float flat[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) flat[i] = values[i][0];
    block_sum<kThreads>(flat);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i][0] = flat[i];
  }
};

template <int W>
struct Chunk<Layout::channels_last, W> {
  static constexpr int kChannels = W;
  const ChunkGrid& grid;
  int64_t index;
  int64_t begin;
  unsigned rows;  // of the chunk
  int row_of_block, column;
  bool active;

  BATCHOPS_DEVICE Chunk(const ChunkGrid& g, int64_t piece) : grid(g) {
    const RowTiles& tiles = g.tiles;
    index = piece / tiles.tiles;
    const int tile = static_cast<int>(piece - index * tiles.tiles);
    begin = index * g.chunk;
    const int64_t left = g.length - begin;
    rows = static_cast<unsigned>(left < g.chunk ? left : g.chunk);
    row_of_block = static_cast<int>(threadIdx.x) / tiles.tile;
    const int unit = tile * tiles.tile + static_cast<int>(threadIdx.x) % tiles.tile;
    column = unit * W;
    active = row_of_block < tiles.rows_at_once && unit < tiles.units;
  }

  BATCHOPS_DEVICE int64_t count() const { return rows; }
  BATCHOPS_DEVICE int64_t first_count() const {
    const unsigned first = kInFlight * grid.tiles.rows_at_once;
    return rows < first ? rows : first;
  }
  BATCHOPS_DEVICE int batches() const {
    return static_cast<int>(ceil_divide<unsigned>(rows, kInFlight * grid.tiles.rows_at_once));
  }
  BATCHOPS_DEVICE Place place(int batch, int u) const {
    const unsigned r = (batch * kInFlight + u) * grid.tiles.rows_at_once + row_of_block;
    const int64_t row = begin + r;
    return {row * grid.C + column, row, column, active && r < rows};
  }
  BATCHOPS_DEVICE int64_t channel_of(int j) const { return column + j; }
  BATCHOPS_DEVICE bool has_channel() const { return active; }
  BATCHOPS_DEVICE bool writes() const { return active && row_of_block == 0; }

  struct Scratch {
    float by_thread[2 * W][kThreads];
  };
  // Over the block's rows, halving them; every thread gets its columns' sums.
  template <int kValues>
  BATCHOPS_DEVICE void sum(float (&values)[kValues][W], Scratch& scratch) const {
    static_assert(kValues <= 2);
    const int t = threadIdx.x;
    const int height = grid.tiles.rows_at_once;
#pragma unroll
    for (int i = 0; i < kValues * W; ++i) scratch.by_thread[i][t] = values[i / W][i % W];
    int half = 1;
    while (half < height) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
      __syncthreads();
      if (row_of_block < half && row_of_block + half < height) {
#pragma unroll
        for (int i = 0; i < kValues * W; ++i) {
          scratch.by_thread[i][t] += scratch.by_thread[i][t + half * grid.tiles.tile];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues * W; ++i) {
      values[i / W][i % W] = scratch.by_thread[i][t % grid.tiles.tile];
    }
    __syncthreads();
  }
};

// One piece of step 3. In channels_last a thread stays with its channels, so that their
// coefficients are loaded once.
template <Layout kLayout, int W>
struct Piece;

template <int W>
struct Piece<Layout::channels_first, W> {
  const ApplyGrid& grid;
  int64_t begin, first_row, first_column;
  unsigned first_channel;

  BATCHOPS_DEVICE Piece(const ApplyGrid& g, int64_t piece) : grid(g) {
    begin = piece * (kInFlight * kThreads);
    first_row = begin / g.split.units;
    first_column = begin - first_row * g.split.units;
    first_channel = static_cast<unsigned>(first_row % g.by_C.divisor);
  }
  BATCHOPS_DEVICE int batches() const { return 1; }
  BATCHOPS_DEVICE Place place(int, int u, int64_t& channel) const {
    const unsigned t = u * kThreads + threadIdx.x;
    unsigned row;
    int64_t column;
    grid.split.step(first_column, t, row, column);
    const unsigned c = first_channel + row;
    channel = c - grid.by_C.quotient(c) * grid.by_C.divisor;
    column *= W;
    return {(first_row + row) * grid.row + column, first_row + row, column,
            begin + t < grid.length && column < grid.row};
  }
};

template <int W>
struct Piece<Layout::channels_last, W> {
  const ApplyGrid& grid;
  int64_t begin;
  int row_of_block, column;
  bool active;

  BATCHOPS_DEVICE Piece(const ApplyGrid& g, int64_t piece) : grid(g) {
    const RowTiles& tiles = g.tiles;
    const int64_t index = piece / tiles.tiles;
    const int tile = static_cast<int>(piece - index * tiles.tiles);
    begin = index * g.batches * kInFlight * tiles.rows_at_once;
    row_of_block = static_cast<int>(threadIdx.x) / tiles.tile;
    column = (tile * tiles.tile + static_cast<int>(threadIdx.x) % tiles.tile) * W;
    active = row_of_block < tiles.rows_at_once && column < g.row;
  }
  BATCHOPS_DEVICE int batches() const { return grid.batches; }
  BATCHOPS_DEVICE Place place(int batch, int u, int64_t& channel) const {
    const int64_t row = begin + (batch * kInFlight + u) * grid.tiles.rows_at_once + row_of_block;
    channel = column;
    return {row * grid.row + column, row, column, active && row < grid.length};
  }
};

// ---- the arithmetic of a channel

// z = (x - mean) · scale + shift. Forward and backward must find the same z to the last bit, so
// the roundings are spelled out: no compiler may contract them one way here and another there.
struct Affine {
  float mean, scale, shift;

  BATCHOPS_DEVICE float operator()(float x) const {
    return __fmaf_rn(__fsub_rn(x, mean), scale, shift);
  }
};

// The low part of the mean goes into the shift.
BATCHOPS_DEVICE Affine make_affine(float mean, float mean_low, float rstd, float weight,
                                   float bias) {
  const float scale = __fmul_rn(rstd, weight);
  return {mean, scale, __fmaf_rn(-mean_low, scale, bias)};
}

struct Parameters {
  const void* weight;
  const void* bias;
  DType dtype;

  BATCHOPS_DEVICE Affine affine(int64_t c, float mean, float mean_low, float rstd) const {
    return make_affine(mean, mean_low, rstd, weight ? load_as_float(weight, dtype, c) : 1.0f,
                       bias ? load_as_float(bias, dtype, c) : 0.0f);
  }
};

// ---- the mask: bit i % 8 of byte i / 8 of a padded row belongs to element i

inline int64_t mask_row_bytes(int64_t row) { return ceil_divide<int64_t>(row, 8); }

// Bit j of the result belongs to element j of the unit.
BATCHOPS_DEVICE unsigned load_mask(const uint8_t* mask, int64_t row_bytes, const Place& place) {
  return mask[place.row * row_bytes + place.column / 8] >> (place.column % 8);
}

// All lanes of the warp must call it, those without an element too (with bits = 0): the lanes of
// one byte are neighbours, and the first of them writes it.
template <int W>
BATCHOPS_DEVICE void store_mask(uint8_t* mask, int64_t row_bytes, const Place& place,
                                unsigned bits) {
  if constexpr (W == 4) {
    bits |= __shfl_down_sync(kAllLanes, bits, 1) << 4;
  } else if constexpr (W == 1) {
    bits = __ballot_sync(kAllLanes, static_cast<int>(bits)) >> (threadIdx.x % kWarp);
  }
  if (place.valid && place.column % 8 == 0) {
    mask[place.row * row_bytes + place.column / 8] = static_cast<uint8_t>(bits);
  }
}

}  // namespace batchops::cuda
