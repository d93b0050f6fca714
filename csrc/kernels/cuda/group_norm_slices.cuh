// channels_first, or HxW = 1: groups are slices of consecutive elements.
//
//   elements  base … base + end, of which begin … end are the part's; base is a multiple of 8, so
//             that units of every width are aligned wherever the part begins
//   planes    the HxW elements of a channel; the first may begin before the part
//
// The part lies in shared memory as it does in the tensor, and any thread may read any of it.
#pragma once
#include "kernels/cuda/group_norm.cuh"

namespace batchops::cuda::group {

// Where a part lies.
struct SlicesPlace {
  int64_t base;
  int begin, end;
  int64_t first_group;
  int groups;
  int64_t first_sum;  // of `begin`'s channel among the backward's sums [N · parts, C]
  int64_t column;     // of `begin` in its plane
  unsigned channel;   // of `begin`
  int channels;
  int64_t mask_row, mask_column;  // of `begin`

  SlicesPlace() = default;
  BATCHOPS_DEVICE SlicesPlace(const Cut& cut, int64_t piece) {
    int64_t from = 0, to = 0;  // in the group
    int64_t slot = 0;
    if (cut.parts == 1) {
      first_group = piece * cut.whole;
      const int64_t left = cut.groups - first_group;
      groups = static_cast<int>(left < cut.whole ? left : cut.whole);
      to = groups * cut.M;
    } else {
      first_group = cut.by_parts.quotient(piece);
      slot = piece - first_group * cut.parts;
      groups = 1;
      from = unpadded(cut, slot * cut.chunk);
      to = slot + 1 == cut.parts ? cut.M : unpadded(cut, (slot + 1) * cut.chunk);
    }
    const int64_t n = cut.by_G.quotient(first_group);
    const int64_t first = first_group * cut.M + from;
    base = first & ~int64_t{7};
    begin = static_cast<int>(first - base);
    end = begin + static_cast<int>(to - from);
    const int64_t plane = cut.by_HxW.quotient(from);
    column = from - plane * cut.HxW;
    channel = static_cast<unsigned>((first_group - n * cut.G) * cut.D + plane);
    first_sum = (n * cut.parts + slot) * cut.C + channel;
    channels = static_cast<int>(cut.by_HxW.quotient(to - 1) - plane + 1);
    mask_row = cut.by_mask_row.quotient(first);
    mask_column = first - mask_row * cut.mask_row;
  }

 private:
  // Of a position in the group, in which rows of the mask are padded to whole bytes.
  BATCHOPS_DEVICE static int64_t unpadded(const Cut& cut, int64_t position) {
    if (!cut.padded) return position;
    const int64_t rows = position / cut.padded_row;
    const int64_t rest = position - rows * cut.padded_row;
    return rows * cut.mask_row + (rest < cut.mask_row ? rest : cut.mask_row);
  }
};

struct Slices : SlicesPlace {
  using Place = SlicesPlace;
  static constexpr bool kPixels = false;
  const Cut& cut;

  BATCHOPS_DEVICE Slices(const Cut& c, int64_t piece) : Place(c, piece), cut(c) {}
  BATCHOPS_DEVICE Slices(const Cut& c, const Place& place) : Place(place), cut(c) {}

  BATCHOPS_DEVICE int64_t channel_of(int r) const {
    const unsigned c = channel + static_cast<unsigned>(r);
    return c - cut.by_C.quotient(c) * cut.by_C.divisor;
  }
  BATCHOPS_DEVICE int group_of_channel(int r) const {
    return cut.parts > 1 ? 0 : static_cast<int>(cut.by_D.quotient(static_cast<unsigned>(r)));
  }

  // A unit of which some may lie past the tensor's end.
  template <class T, int W>
  BATCHOPS_DEVICE Unit<T, W> load_at(const T* from, int64_t at) const {
    if (W == 1 || at + W <= cut.numel) return load_unit<T, W>(from + at);
    T elements[W];
    memset(static_cast<void*>(elements), 0, sizeof elements);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (at + j < cut.numel) elements[j] = from[at + j];
    }
    Unit<T, W> unit;
    memcpy(&unit.bits, elements, sizeof elements);
    return unit;
  }

  template <class T, int W>
  BATCHOPS_DEVICE void keep(T* to, const T* from) const {
    const int units = (end + W - 1) / W;
    const bool past = W > 1 && base + int64_t{units} * W > cut.numel;  // the tensor's end
    const int mine = static_cast<int>(threadIdx.x) * W;
    const T* __restrict__ x = from + base;
    const T* __restrict__ next = x + mine;
    T* place = to + mine;
    int left = units - past - static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (; left > (kInFlight - 1) * kBlock; left -= kInFlight * kBlock) {
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        copy_async<T, W>(place + k * kBlock * W, next + k * kBlock * W);
      }
      place += kInFlight * kBlock * W;
      next += kInFlight * kBlock * W;
    }
#pragma unroll 1
    for (; left > 0; left -= kBlock) {
      copy_async<T, W>(place, next);
      place += kBlock * W;
      next += kBlock * W;
    }
    if (past && threadIdx.x == 0) {
      for (int i = (units - 1) * W; i < end; ++i) to[i] = x[i];
    }
  }

  // ---- sums over the part

  BATCHOPS_DEVICE Range range_of_group(int r) const {
    if (cut.parts > 1) return {begin, end};
    const int M = static_cast<int>(cut.M);
    return {begin + r * M, begin + (r + 1) * M};
  }
  BATCHOPS_DEVICE Range range_of_channel(int r) const {
    const int64_t from = begin - column + r * cut.HxW;
    const int64_t to = from + cut.HxW;
    return {from < begin ? begin : static_cast<int>(from), to > end ? end : static_cast<int>(to)};
  }

  // Each group's moments, of what the block has kept.
  template <class T, int W>
  BATCHOPS_DEVICE void moments(const T* x, const Arena& arena) const {
    if (cut.whole_groups) {
      stretches<T, W>(x, arena);
    } else {
      stretches<T, 1>(x, arena);
    }
    const Moments* of_stretch = arena.stretches();
    Moments* found = arena.moments();
    const int segments = cut.over_groups.segments;
    merge_groups(
        groups, cut.group_lanes, [&](int) { return segments; },
        [&](int r) { return int64_t{range_of_group(r).end} - range_of_group(r).begin; },
        [&](int r, int k) { return of_stretch[r * segments + k]; },
        [&](int r, const MeanAndVariance& merged) {
          found[r] = as_moments(merged, int64_t{range_of_group(r).end} - range_of_group(r).begin);
        });
    __syncthreads();
  }

  // The moments of each stretch of a group that a team of lanes takes, around the mean of what it
  // takes first.
  template <class T, int W>
  BATCHOPS_DEVICE void stretches(const T* x, const Arena& arena) const {
    const RowTeams& teams = cut.over_groups;
    const int lane = teams.lanes.lane(static_cast<int>(threadIdx.x));
    const int team = teams.lanes.team(static_cast<int>(threadIdx.x));
    const int total = groups * teams.segments;
    const int step = W << teams.lanes.shift;
    Moments* to = arena.stretches();
    const int before = teams.before_warp();
#pragma unroll 1
    for (int first = 0; first + before < total; first += teams.at_once()) {
      const int s = first + team;
      Range of{0, 0};
      if (s < total) {
        const int r = static_cast<int>(teams.by_segments.quotient(static_cast<unsigned>(s)));
        of = range_of_group(r);
        of.begin += (s - r * teams.segments) * teams.segment;
        if (of.begin + teams.segment < of.end) of.end = of.begin + teams.segment;
      }
      const int mine = of.begin + lane * W;
      float2 sum = make_float2(0.0f, 0.0f);  // and how many
#pragma unroll 1
      for (int k = 0; k < kInFlight && mine + k * step < of.end; ++k) {
        float v[W];
        to_float<T, W>(load_unit<T, W>(x + mine + k * step), v);
#pragma unroll
        for (int j = 0; j < W; ++j) sum.x += v[j];
        sum.y += W;
      }
      sum = sum_of_lanes(sum, teams.lanes.count());
      const float shift = sum.x / sum.y;
      sum = make_float2(0.0f, 0.0f);
      const auto take = [&](const T* unit) {
        float v[W];
        to_float<T, W>(load_unit<T, W>(unit), v);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float d = v[j] - shift;
          sum.x += d;
          sum.y += d * d;
        }
      };
      const T* from = x + mine;
      const auto rest = static_cast<unsigned>(of.end - mine + step - 1);
      int left = mine < of.end ? static_cast<int>(rest / W >> teams.lanes.shift) : 0;
#pragma unroll 1
      for (; left >= kInFlight; left -= kInFlight) {
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) take(from + k * step);
        from += kInFlight * step;
      }
#pragma unroll 1
      for (; left > 0; --left) {
        take(from);
        from += step;
      }
      sum = sum_of_lanes(sum, teams.lanes.count());
      if (lane == 0 && s < total) {
        const auto n = static_cast<float>(of.end > of.begin ? of.end - of.begin : 0);
        const float rest = sum.y - sum.x * sum.x / n;
        to[s] = {shift, sum.x, rest < 0.0f ? 0.0f : rest, n};  // a NaN stays
      }
    }
    __syncthreads();
  }

  // channels[r] = what the job adds over each channel, of what is kept.
  template <class T, int W, class Job>
  BATCHOPS_DEVICE void sum_channels(const Job& job, const Arena& arena) const {
    if (cut.whole_channels) {
      channels_by<T, W>(job, arena);
    } else {
      channels_by<T, 1>(job, arena);
    }
  }
  template <class T, int kRead, class Job>
  BATCHOPS_DEVICE void channels_by(const Job& job, const Arena& arena) const {
    by_residual(job, [&](const auto& of_job) {
      using Of = std::decay_t<decltype(of_job)>;
      sum_rows<kRead>(
          channels, cut.over_channels, [this](int r) { return range_of_channel(r); },
          [this, &of_job](int r) {
            const auto k = of_job.make(channel_of(r), group_of_channel(r));
            return [this, &of_job, k](auto width, int i, float2& sum) {
              constexpr int kWidth = decltype(width)::value;
              typename Of::template Held<kWidth> held;
              of_job.template load<kWidth>(held, i);
              const unsigned bits = of_job.masked() ? mask_bits(of_job.mask, i) : 0u;
              constexpr int kPiece = sum_width(kWidth);
#pragma unroll
              for (int h = 0; h < kWidth; h += kPiece) {
                const auto piece = Of::template piece<kPiece>(held, h / kPiece);
                of_job.template add<kPiece>(piece, i + h, Same{k}, bits >> h,
                                            [&](int, float a, float b) {
                                              sum.x += a;
                                              sum.y += b;
                                            });
              }
            };
          },
          arena.slots(), arena.channels());
    });
  }

  BATCHOPS_DEVICE Range channels_of_group(int r) const {
    if (cut.parts > 1) return {0, channels};
    const int D = static_cast<int>(cut.D);
    return {r * D, (r + 1) * D};
  }

  // Bit j belongs to element i + j.
  BATCHOPS_DEVICE unsigned mask_bits(const uint8_t* mask, int i) const {
    if (!cut.padded) {
      const int64_t at = base + i;
      return mask[at / 8] >> (at % 8);
    }
    unsigned rows;
    int64_t at;
    cut.mask_rows.step(mask_column, static_cast<unsigned>(i - begin), rows, at);
    return mask[(mask_row + rows) * cut.mask_row_bytes + at / 8] >> (at % 8);
  }

  // ---- element by element

  template <class T, int W, class Job>
  BATCHOPS_DEVICE void apply(const Job& job) const {
    if (W == 1 || cut.padded) {
      apply_elements(job);
    } else if constexpr (W > 1) {
      if (cut.tabled) {
        apply_planes<W>(job);
      } else {
        apply_units<W>(job);
      }
    }
  }

  // Units of which all is in the tensor.
  struct Whole {
    template <class T, int W>
    BATCHOPS_DEVICE Unit<T, W> load_at(const T* from, int64_t at) const {
      return load_unit<T, W>(from + at);
    }
  };

  // Whole units that lie within a channel each.
  template <int W, class Job>
  BATCHOPS_DEVICE void apply_planes(const Job& job) const {
    constexpr int kAhead = Job::kAhead;
    using Coefficients = typename Job::Coefficients;
    Coefficients* table = job.arena.template table<Coefficients>();
    const unsigned column_in = static_cast<unsigned>(column) - static_cast<unsigned>(begin);
    for (int r = threadIdx.x; r < channels; r += kBlock) {
      table[r] = job.make(channel_of(r), group_of_channel(r));
    }
    __syncthreads();
    by_residual(job, [&](const auto& of) {
      using Of = std::decay_t<decltype(of)>;
#pragma unroll 1
      for (int first = begin; first < end; first += kBlock * kAhead * W) {
        const int i0 = first + static_cast<int>(threadIdx.x) * W;
        typename Of::template Held<W> held[kAhead];
        unsigned bits[kAhead] = {};
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int i = i0 + u * kBlock * W;
          if (i >= end) continue;
          of.template load_outer<W>(Whole{}, held[u], base + i, i);
          if (of.masked()) bits[u] = mask_bits(of.mask, i);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int i = i0 + u * kBlock * W;
          unsigned found = 0;
          if (i < end) {
            const unsigned r = cut.plane.divide.quotient(column_in + static_cast<unsigned>(i));
            const Coefficients k = table[r];
            found = of.template run<W>(held[u], base + i, Range{0, W}, Same{k}, bits[u]);
          }
          if (of.writes_mask()) {
            store_mask_byte<W>(of.mask_to + (base + i) / 8, i < end && (base + i) % 8 == 0, found);
          }
        }
      }
    });
  }

  template <int W, class Job>
  BATCHOPS_DEVICE void apply_units(const Job& job) const {
    constexpr int kAhead = Job::kAhead;
    const int units = (end + W - 1) / W;
#pragma unroll 1
    for (int first = 0; first < units; first += kBlock * kAhead) {
      typename Job::template Held<W> held[kAhead];
      unsigned bits[kAhead] = {};
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = (first + u * kBlock + static_cast<int>(threadIdx.x)) * W;
        if (i >= end || i + W <= begin) continue;
        job.template load_outer<W>(*this, held[u], base + i, i);
        if (job.masked()) bits[u] = mask_bits(job.mask, i);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = (first + u * kBlock + static_cast<int>(threadIdx.x)) * W;
        unsigned found = 0;
        if (i < end && i + W > begin) {
          const Range valid{i < begin ? begin - i : 0, i + W > end ? end - i : W};
          constexpr int kPiece = Job::template kOddPiece<W>;
#pragma unroll
          for (int h = 0; h < W; h += kPiece) {
            const Range of{valid.begin < h ? 0 : valid.begin - h,
                           valid.end < h + kPiece ? valid.end - h : kPiece};
            if (of.begin >= of.end) continue;
            typename Job::Coefficients k[kPiece];
            coefficients<kPiece>(job, i + h, of, k);
            found |= job.template run<kPiece>(job.template piece<kPiece>(held[u], h / kPiece),
                                              base + i + h, of, Each{k}, bits[u] >> h)
                     << h;
          }
        }
        if (job.writes_mask()) {
          store_mask_byte<W>(job.mask_to + (base + i) / 8,
                             i < end && i >= begin && (base + i) % 8 == 0, found);
        }
      }
    }
  }

  template <int W, class Job>
  BATCHOPS_DEVICE void coefficients(const Job& job, int i, const Range& valid,
                                    typename Job::Coefficients (&k)[W]) const {
    unsigned r;
    int64_t at;
    cut.plane.step(column, static_cast<unsigned>(i + valid.begin - begin), r, at);
    if (cut.contiguous) {
      job.template make_row<W>(channel_of(r), group_of_channel(r), k);
      return;
    }
    auto current = job.make(channel_of(r), group_of_channel(r));
    if (cut.one_channel) {
#pragma unroll
      for (int j = 0; j < W; ++j) k[j] = current;
      return;
    }
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (j >= valid.begin && j < valid.end) {
        if (at == cut.HxW) {
          ++r;
          at = 0;
          current = job.make(channel_of(r), group_of_channel(r));
        }
        ++at;
      }
      k[j] = current;
    }
  }

  // Walks rows of the mask padded to whole bytes, an element a thread.
  template <class Job>
  BATCHOPS_DEVICE void apply_elements(const Job& job) const {
    constexpr int kAhead = Job::kAhead;
    const int64_t last = mask_column + (end - begin);
    const int64_t rows = last / cut.mask_row;
    const int length =
        static_cast<int>(rows * cut.padded_row + (last - rows * cut.mask_row) - mask_column);
#pragma unroll 1
    for (int first = 0; first < length; first += kBlock * kAhead) {
      typename Job::template Held<1> held[kAhead];
      unsigned bits[kAhead] = {};
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const cuda::Place place =
            element(first + u * kBlock + static_cast<int>(threadIdx.x), length);
        if (!place.valid) continue;
        job.template load_outer<1>(*this, held[u], base + place.offset,
                                   static_cast<int>(place.offset));
        if (job.masked()) {
          bits[u] =
              job.mask[place.row * cut.mask_row_bytes + place.column / 8] >> (place.column % 8);
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const cuda::Place place =
            element(first + u * kBlock + static_cast<int>(threadIdx.x), length);
        unsigned found = 0;
        if (place.valid) {
          const int i = static_cast<int>(place.offset);
          unsigned r;
          int64_t at;
          cut.plane.step(column, static_cast<unsigned>(i - begin), r, at);
          const auto k = job.make(channel_of(r), group_of_channel(r));
          found = job.template run<1>(held[u], base + i, Range{0, 1}, Same{k}, bits[u]);
        }
        if (job.writes_mask()) {
          store_mask_byte<1>(job.mask_to + place.row * cut.mask_row_bytes + place.column / 8,
                             place.valid && place.column % 8 == 0, found);
        }
      }
    }
  }

  // The t-th element of the padded walk; its offset is local.
  BATCHOPS_DEVICE cuda::Place element(int t, int length) const {
    unsigned rows;
    int64_t at;
    cut.padded_rows.step(mask_column, static_cast<unsigned>(t), rows, at);
    const int64_t i = begin - mask_column + rows * cut.mask_row + at;
    return {i, mask_row + rows, at, t < length && at < cut.mask_row && i < end};
  }
};

}  // namespace batchops::cuda::group
