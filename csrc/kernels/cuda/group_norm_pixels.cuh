// channels_last: a group is D neighbouring columns of HxW rows of C elements, the pixels.
//
// A part is some rows of a tile of columns. A thread stays with the W columns of its unit, so that
// their coefficients are in registers:
//
//   thread t:  row t / tile, unit t % tile   (t ≥ tile · rows_at_once: idle)
//
// and `across` times that where a tile has more units than the block has threads.
#pragma once
#include "kernels/cuda/group_norm.cuh"

namespace batchops::cuda::group {

struct Pixels {
  static constexpr bool kPixels = true;
  const Cut& cut;
  int64_t first_group;
  int groups;
  int64_t first_sum;  // of the first column among the backward's sums [N · parts, C]
  int64_t first_row;
  int rows;
  int64_t first_column;
  int into_group;  // columns of its group before the first
  int channels;

  BATCHOPS_DEVICE Pixels(const Cut& c, int64_t piece) : cut(c) {
    const int64_t set = piece / cut.parts;
    const int64_t slot = piece - set * cut.parts;
    const int64_t n = set / cut.tiles;
    first_column = (set - n * cut.tiles) * cut.width;
    const int64_t columns = cut.C - first_column;
    channels = static_cast<int>(columns < cut.width ? columns : cut.width);
    const int64_t g = first_column / cut.D;
    first_group = n * cut.G + g;
    into_group = static_cast<int>(first_column - g * cut.D);
    groups = static_cast<int>((first_column + channels - 1) / cut.D - g + 1);
    const int64_t left = cut.HxW - slot * cut.chunk;
    rows = static_cast<int>(left < cut.chunk ? left : cut.chunk);
    first_row = n * cut.HxW + slot * cut.chunk;
    first_sum = (n * cut.parts + slot) * cut.C + first_column;
  }

  BATCHOPS_DEVICE int64_t channel_of(int r) const { return first_column + r; }
  BATCHOPS_DEVICE int group_of_channel(int r) const {
    return static_cast<int>(cut.by_D.quotient(static_cast<unsigned>(into_group + r)));
  }
  // Columns of the tile.
  BATCHOPS_DEVICE Range channels_of_group(int r) const {
    const int64_t from = r * cut.D - into_group;
    const int64_t to = from + cut.D;
    return {from < 0 ? 0 : static_cast<int>(from), to > channels ? channels : static_cast<int>(to)};
  }

  // f(first column of a unit, first row, whether the thread has elements there); the thread's rows
  // are tiles.rows_at_once apart.
  template <int W, class F>
  BATCHOPS_DEVICE void for_units(const ColumnTiles& tiles, F f) const {
    const int row = static_cast<int>(threadIdx.x) / tiles.tile;
    const int unit = static_cast<int>(threadIdx.x) - row * tiles.tile;
#pragma unroll 1
    for (int a = 0; a < tiles.across; ++a) {
      const int column = (a * tiles.tile + unit) * W;
      f(column, row, row < tiles.rows_at_once && column < channels);
    }
  }
  BATCHOPS_DEVICE int64_t offset(int r, int column) const {
    return (first_row + r) * cut.C + first_column + column;
  }
  // Where it is kept.
  BATCHOPS_DEVICE int local(int r, int column) const { return r * cut.kept_row + column; }

  template <class T, int W>
  BATCHOPS_DEVICE Unit<T, W> load_at(const T* from, int64_t at) const {
    return load_unit<T, W>(from + at);
  }

  template <class T, int W>
  BATCHOPS_DEVICE void keep(T* to, const T* __restrict__ from) const {
    const int step = cut.by_unit.rows_at_once;
    for_units<W>(cut.by_unit, [&](int first, int row, bool active) {
      if (!active) return;
      for (int r0 = row; r0 < rows; r0 += step * kInFlight) {
        Unit<T, W> held[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int r = r0 + k * step;
          if (r < rows) held[k] = load_unit<T, W>(from + offset(r, first));
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int r = r0 + k * step;
          if (r < rows) *reinterpret_cast<Unit<T, W>*>(to + local(r, first)) = held[k];
        }
      }
    });
  }

  // ---- sums over the part

  // channels[r] = the sum of what add() adds for each column.
  //   auto add = of_unit(int column);   add(int row, float2 (&sums)[W])
  template <int W, class OfUnit>
  BATCHOPS_DEVICE void sum_columns(const Arena& arena, OfUnit of_unit) const {
    const ColumnTiles& tiles = cut.by_sum;
    float2* slots = arena.slots();
    float2* to = arena.channels();
    const int line = tiles.tile * W;
    int from = 0;  // of this turn's columns
    for_units<W>(tiles, [&](int first, int row, bool active) {
      float2 sums[W];
#pragma unroll
      for (int j = 0; j < W; ++j) sums[j] = make_float2(0.0f, 0.0f);
      if (active) {
        const auto add = of_unit(first);
#pragma unroll 1
        for (int r = row; r < rows; r += tiles.rows_at_once) add(r, sums);
      }
#pragma unroll
      for (int j = 0; j < W; ++j) slots[j * kBlock + threadIdx.x] = sums[j];
      __syncthreads();
      for (int c = threadIdx.x; c < line && from + c < channels; c += kBlock) {
        const int at = c % W * kBlock + c / W;
        float2 sum = slots[at];
        for (int h = 1; h < tiles.rows_at_once; ++h) {
          const float2 more = slots[at + h * tiles.tile];
          sum.x += more.x;
          sum.y += more.y;
        }
        to[from + c] = sum;
      }
      from += line;
      __syncthreads();
    });
  }

  template <class T, int W, int kSum = sum_width(W)>
  BATCHOPS_DEVICE void moments(const T* x, const Arena& arena) const {
    const auto range = [this](int r) { return channels_of_group(r); };
    const float2* by_column = arena.channels();
    float2* sums = arena.sums();
    Moments* found = arena.moments();
    const auto sum_groups = [&] {
      sum_rows<1>(
          groups, cut.over_groups, range,
          [by_column](int) {
            return [by_column](auto, int i, float2& sum) {
              sum.x += by_column[i].x;
              sum.y += by_column[i].y;
            };
          },
          arena.slots(), sums);
    };
    sum_columns<kSum>(arena, [&](int first) {
      return [this, x, first](int r, float2(&to)[kSum]) {
        float v[kSum];
        to_float<T, kSum>(load_unit<T, kSum>(x + local(r, first)), v);
#pragma unroll
        for (int j = 0; j < kSum; ++j) to[j].x += v[j];
      };
    });
    sum_groups();
    for (int r = threadIdx.x; r < groups; r += kBlock) {
      const Range of = range(r);
      const float count = static_cast<float>(of.end - of.begin) * static_cast<float>(rows);
      found[r] = {sums[r].x / count, 0.0f, 0.0f, count};
    }
    __syncthreads();
    sum_columns<kSum>(arena, [&](int first) {
      struct Shifts {
        float of[kSum];
      } shift;
#pragma unroll
      for (int j = 0; j < kSum; ++j) shift.of[j] = found[group_of_channel(first + j)].shift;
      return [this, x, first, shift](int r, float2(&to)[kSum]) {
        float v[kSum];
        to_float<T, kSum>(load_unit<T, kSum>(x + local(r, first)), v);
#pragma unroll
        for (int j = 0; j < kSum; ++j) {
          const float d = v[j] - shift.of[j];
          to[j].x += d;
          to[j].y += d * d;
        }
      };
    });
    sum_groups();
    for (int r = threadIdx.x; r < groups; r += kBlock) {
      found[r].sum = sums[r].x;
      const float rest = sums[r].y - sums[r].x * sums[r].x / found[r].count;
      found[r].square = rest < 0.0f ? 0.0f : rest;  // a NaN stays
    }
    __syncthreads();
  }

  template <class T, int W, class Job, int kSum = sum_width(W)>
  BATCHOPS_DEVICE void sum_channels(const Job& job, const Arena& arena) const {
    sum_columns<kSum>(arena, [&](int first) {
      struct All {
        typename Job::Coefficients of[kSum];
      } k;
#pragma unroll
      for (int j = 0; j < kSum; ++j) {
        k.of[j] = job.make(channel_of(first + j), group_of_channel(first + j));
      }
      return [this, &job, k, first](int r, float2(&to)[kSum]) {
        typename Job::template Held<kSum> held;
        job.template load<kSum>(held, local(r, first));
        const unsigned bits = job.masked() ? mask_bits(job.mask, r, first) : 0u;
        job.template add<kSum>(held, Each{k.of}, bits, [&](int j, float a, float b) {
          to[j].x += a;
          to[j].y += b;
        });
      };
    });
  }

  BATCHOPS_DEVICE int64_t mask_byte(int r, int from) const {
    return (first_row + r) * cut.mask_row_bytes + (first_column + from) / 8;
  }
  BATCHOPS_DEVICE unsigned mask_bits(const uint8_t* mask, int r, int from) const {
    return mask[mask_byte(r, from)] >> ((first_column + from) % 8);
  }

  // ---- element by element

  template <class T, int W, class Job>
  BATCHOPS_DEVICE void apply(const Job& job) const {
    constexpr int kAhead = Job::kAhead;
    const int step = cut.by_unit.rows_at_once;
    for_units<W>(cut.by_unit, [&](int first, int row, bool active) {
      typename Job::Coefficients k[W];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (active) k[j] = job.make(channel_of(first + j), group_of_channel(first + j));
      }
#pragma unroll 1
      for (int r0 = 0; r0 < rows; r0 += step * kAhead) {
        typename Job::template Held<W> held[kAhead];
        unsigned bits[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int r = r0 + a * step + row;
          if (!active || r >= rows) continue;
          job.template load_outer<W>(*this, held[a], offset(r, first), local(r, first));
          if (job.masked()) bits[a] = mask_bits(job.mask, r, first);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int r = r0 + a * step + row;
          const bool valid = active && r < rows;
          unsigned found = 0;
          if (valid) {
            found = job.template run<W>(held[a], offset(r, first), Range{0, W}, Each{k}, bits[a]);
          }
          if (job.writes_mask()) {
            store_mask_byte<W>(job.mask_to + mask_byte(r, first), valid && first % 8 == 0, found);
          }
        }
      }
    });
  }
};

}  // namespace batchops::cuda::group
