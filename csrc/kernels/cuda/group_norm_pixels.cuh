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

// Where a part lies.
struct PixelsPlace {
  int64_t first_group;
  int groups;
  int64_t first_sum;  // of the first column among the backward's sums [N · parts, C]
  int64_t first_row;
  int rows;
  int64_t first_column;
  int into_group;  // columns of its group before the first
  int channels;

  PixelsPlace() = default;
  BATCHOPS_DEVICE PixelsPlace(const Cut& cut, int64_t piece) {
    const int64_t set = cut.by_parts.quotient(piece);
    const int64_t slot = piece - set * cut.parts;
    const int64_t n = cut.by_tiles.quotient(set);
    first_column = (set - n * cut.tiles) * cut.width;
    const int64_t columns = cut.C - first_column;
    channels = static_cast<int>(columns < cut.width ? columns : cut.width);
    const int64_t g = cut.by_D.quotient(static_cast<unsigned>(first_column));
    first_group = n * cut.G + g;
    into_group = static_cast<int>(first_column - g * cut.D);
    groups = static_cast<int>(
        cut.by_D.quotient(static_cast<unsigned>(first_column + channels - 1)) - g + 1);
    const int64_t left = cut.HxW - slot * cut.chunk;
    rows = static_cast<int>(left < cut.chunk ? left : cut.chunk);
    first_row = n * cut.HxW + slot * cut.chunk;
    first_sum = (n * cut.parts + slot) * cut.C + first_column;
  }
};

struct Pixels : PixelsPlace {
  using Place = PixelsPlace;
  static constexpr bool kPixels = true;
  const Cut& cut;

  BATCHOPS_DEVICE Pixels(const Cut& c, int64_t piece) : Place(c, piece), cut(c) {}
  BATCHOPS_DEVICE Pixels(const Cut& c, const Place& place) : Place(place), cut(c) {}

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
    const int row = static_cast<int>(tiles.by_tile.quotient(threadIdx.x));
    const int unit = static_cast<int>(threadIdx.x) - row * tiles.tile;
#pragma unroll 1
    for (int a = 0; a < tiles.across; ++a) {
      const int column = (a * tiles.tile + unit) * W;
      f(column, row, row < tiles.rows_at_once && column < channels);
    }
  }
  // How many of them, from one that is below tiles.rows_at_once.
  BATCHOPS_DEVICE int rows_of(const ColumnTiles& tiles, int first) const {
    const int rest = rows - first + tiles.rows_at_once - 1;
    return static_cast<int>(tiles.by_rows.quotient(static_cast<unsigned>(rest)));
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

  // Of W columns from `first`, a multiple of W: their parameters by wide loads.
  template <int W, class Job, class Coefficients>
  BATCHOPS_DEVICE void coefficients(const Job& job, int first, Coefficients (&k)[W]) const {
    float w[W], b[W];
    job.args.affines.template load<W>(channel_of(first), w, b);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      k[j] = job.make_with(job.arena.terms()[group_of_channel(first + j)], w[j], b[j]);
    }
  }

  // ---- what is kept, and sums over it

  // channels[c] = the sum over the block's threads of sums[j], of column c = the thread's first
  // column + j. All threads; those that have no columns bring zeros.
  template <int W>
  BATCHOPS_DEVICE void add_up(const ColumnTiles& tiles, int first_of_turn, const float2 (&sums)[W],
                              const Arena& arena) const {
    float2* slots = arena.slots();
    float2* to = arena.channels();
    const int items = tiles.tile * W << tiles.lanes.shift;
#pragma unroll
    for (int j = 0; j < W; ++j) slots[j * (kBlock + 1) + threadIdx.x] = sums[j];
    __syncthreads();
#pragma unroll 1
    for (int base = 0; base < items; base += kBlock) {
      const int item = base + static_cast<int>(threadIdx.x);
      if ((item & -kWarp) >= items) break;  // nothing for all of the warp
      const int lane = tiles.lanes.lane(item);
      const int line = tiles.lanes.team(item);
      const int column = first_of_turn + line;
      const bool active = item < items && column < channels;
      float2 sum = make_float2(0.0f, 0.0f);
      if (active) {
        const float2* of_column = slots + line % W * (kBlock + 1) + line / W;
        for (int k = lane; k < tiles.rows_at_once; k += tiles.lanes.count()) {
          const float2 more = of_column[k * tiles.tile];
          sum.x += more.x;
          sum.y += more.y;
        }
      }
      sum = sum_of_lanes(sum, tiles.lanes.count());
      if (active && lane == 0) to[column] = sum;
    }
    __syncthreads();
  }

  template <class T, int W>
  BATCHOPS_DEVICE void keep(T* to, const T* from) const {
    const int step = cut.by_unit.rows_at_once;
    for_units<W>(cut.by_unit, [&](int first, int row, bool active) {
      if (!active) return;
      const int64_t line = int64_t{step} * cut.C;
      const int kept_line = step * cut.kept_row;
      int64_t at = offset(row, first);
      int i = local(row, first);
      int left = rows_of(cut.by_unit, row);
#pragma unroll 1
      for (; left >= kInFlight; left -= kInFlight) {
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          copy_async<T, W>(to + i + k * kept_line, from + at + k * line);
        }
        at += kInFlight * line;
        i += kInFlight * kept_line;
      }
#pragma unroll 1
      for (; left > 0; --left) {
        copy_async<T, W>(to + i, from + at);
        at += line;
        i += kept_line;
      }
    });
  }

  // Each group's moments, of what the block has kept. Columns are summed around shifts of their
  // own.
  template <class T, int W, int kSum = sum_width(W)>
  BATCHOPS_DEVICE void moments(const T* kept, const Arena& arena) const {
    const ColumnTiles& tiles = cut.by_sum;
    const int step = tiles.rows_at_once;
    float* shifts = arena.shifts();
    int first_of_turn = 0;
    for_units<kSum>(tiles, [&](int first, int row, bool active) {
      if (active && row == 0) {
        // Halfway between the middle two of the first four rows: an outlier is neither of them.
        float v[4][kSum];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int r = k * step < rows ? k * step : 0;
          to_float<T, kSum>(load_unit<T, kSum>(kept + local(r, first)), v[k]);
        }
#pragma unroll
        for (int j = 0; j < kSum; ++j) {
          const float low = ::fmaxf(::fminf(v[0][j], v[1][j]), ::fminf(v[2][j], v[3][j]));
          const float high = ::fminf(::fmaxf(v[0][j], v[1][j]), ::fmaxf(v[2][j], v[3][j]));
          shifts[first + j] = 0.5f * low + 0.5f * high;
        }
      }
      __syncthreads();
      float shift[kSum] = {};
      float2 sums[kSum];
#pragma unroll
      for (int j = 0; j < kSum; ++j) {
        sums[j] = make_float2(0.0f, 0.0f);
        if (active) shift[j] = shifts[first + j];
      }
      if (active) {
        const T* from = kept + local(row, first);
        const int kept_line = step * cut.kept_row;
        const auto take = [&](const T* unit) {
          float v[kSum];
          to_float<T, kSum>(load_unit<T, kSum>(unit), v);
#pragma unroll
          for (int j = 0; j < kSum; ++j) {
            const float d = v[j] - shift[j];
            sums[j].x += d;
            sums[j].y += d * d;
          }
        };
        int left = rows_of(tiles, row);
#pragma unroll 1
        for (; left >= kInFlight; left -= kInFlight) {
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) take(from + k * kept_line);
          from += kInFlight * kept_line;
        }
#pragma unroll 1
        for (; left > 0; --left) {
          take(from);
          from += kept_line;
        }
      }
      add_up<kSum>(tiles, first_of_turn, sums, arena);
      first_of_turn += tiles.tile * kSum;
    });
    const float2* by_column = arena.channels();
    Moments* found = arena.moments();
    const auto columns_of = [&](int r) {
      const Range of = channels_of_group(r);
      return of.end - of.begin;
    };
    merge_groups(
        groups, cut.group_lanes, columns_of, [&](int r) { return int64_t{rows} * columns_of(r); },
        [&](int r, int k) -> Moments {
          const int c = channels_of_group(r).begin + k;
          const auto n = static_cast<float>(rows);
          const float2 sum = by_column[c];
          const float rest = sum.y - sum.x * sum.x / n;
          return {shifts[c], sum.x, rest < 0.0f ? 0.0f : rest, n};  // a NaN stays
        },
        [&](int r, const MeanAndVariance& merged) {
          found[r] = as_moments(merged, int64_t{rows} * columns_of(r));
        });
    __syncthreads();
  }

  // channels[c] = what the job adds over each column, of what the block has kept.
  template <class T, int W, class Job, int kSum = sum_width(W)>
  BATCHOPS_DEVICE void sum_channels(const Job& job, const Arena& arena) const {
    const ColumnTiles& tiles = cut.by_sum;
    int first_of_turn = 0;
    for_units<kSum>(tiles, [&](int first, int row, bool active) {
      typename Job::Coefficients k[kSum];
      float2 sums[kSum];
#pragma unroll
      for (int j = 0; j < kSum; ++j) {
        sums[j] = make_float2(0.0f, 0.0f);
      }
      if (active) {
        coefficients<kSum>(job, first, k);
        by_residual(job, [&](const auto& of) {
          int i = local(row, first);
#pragma unroll Job::kUnroll
          for (int r = row; r < rows; r += tiles.rows_at_once) {
            typename std::decay_t<decltype(of)>::template Held<kSum> held;
            of.template load<kSum>(held, i);
            const unsigned bits = of.masked() ? mask_bits(of.mask, r, first) : 0u;
            of.template add<kSum>(held, i, Each{k}, bits, [&](int j, float s, float p) {
              sums[j].x += s;
              sums[j].y += p;
            });
            i += tiles.rows_at_once * cut.kept_row;
          }
        });
      }
      add_up<kSum>(tiles, first_of_turn, sums, arena);
      first_of_turn += tiles.tile * kSum;
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
    if constexpr (Job::template kPiece<W> < W) {
      apply_by<Job::template kPiece<W>>(cut.by_sum, job);
    } else {
      apply_by<W>(cut.by_unit, job);
    }
  }
  template <int W, class Job>
  BATCHOPS_DEVICE void apply_by(const ColumnTiles& tiles, const Job& job) const {
    constexpr int kAhead = Job::kAhead;
    const int step = tiles.rows_at_once;
    for_units<W>(tiles, [&](int first, int row, bool active) {
      typename Job::Coefficients k[W];
      if (active) coefficients<W>(job, first, k);
      by_residual(job, [&](const auto& of) {
        using Of = std::decay_t<decltype(of)>;
        int64_t at = offset(row, first);
        if constexpr (Of::kLone) {  // what is done for an element concerns no other thread
          if (!active) return;
          int i = local(row, first);
          const int64_t stride = int64_t{step} * cut.C;
          const int i_step = step * cut.kept_row;
#pragma unroll Of::kUnroll
          for (int r = row; r < rows; r += step) {
            typename Of::template Held<W> held;
            of.template load_outer<W>(*this, held, at, i);
            of.template run<W>(held, at, Range{0, W}, Each{k}, 0u);
            at += stride;
            i += i_step;
          }
          return;
        }
        const int64_t stride = int64_t{step} * cut.C;
        int i = local(row, first);
        const int i_step = step * cut.kept_row;
#pragma unroll 1
        for (int r = row; r - row < rows; r += step * kAhead) {
          typename Of::template Held<W> held[kAhead];
          unsigned bits[kAhead] = {};
#pragma unroll
          for (int a = 0; a < kAhead; ++a) {
            if (!active || r + a * step >= rows) continue;
            of.template load_outer<W>(*this, held[a], at + a * stride, i + a * i_step);
            if (of.masked()) bits[a] = mask_bits(of.mask, r + a * step, first);
          }
#pragma unroll
          for (int a = 0; a < kAhead; ++a) {
            const bool valid = active && r + a * step < rows;
            unsigned found = 0;
            if (valid) {
              found = of.template run<W>(held[a], at + a * stride, Range{0, W}, Each{k}, bits[a]);
            }
            if (of.writes_mask()) {
              store_mask_byte<W>(of.mask_to + mask_byte(r + a * step, first),
                                 valid && first % 8 == 0, found);
            }
          }
          at += kAhead * stride;
          i += kAhead * i_step;
        }
      });
    });
  }
};

}  // namespace batchops::cuda::group
