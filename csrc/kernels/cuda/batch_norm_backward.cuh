// What the kernels of batch norm's backward share, and the way to those that read dy and x once.
// With dz = dy · activation'(z):
//
//   dbias = Σ dz,  dweight = rstd · (Σ dz · (x - mean) - mean_low · Σ dz)
//   dx = scale · dz + along · (x - mean) + constant
//
// where in training  along = -scale · rstd · dweight / M,  constant = -scale · dbias / M
// - along · mean_low, of the ghost batch's sums and its M values; and in eval both are 0. z is
// recomputed from x, and from the residual where there is one, unless there is a mask.
#pragma once
#include "kernels/cuda/batch_norm.cuh"

namespace batchops::cuda {

constexpr const char* kBackward = "batch_norm_backward_cuda";

// What dx takes of a column.
struct Direction {
  float mean, scale, along, constant;
  float shift;  // Affine::shift

  // Where x is not centred.
  BATCHOPS_DEVICE float constant_of_x() const { return __fmaf_rn(-mean, along, constant); }
};
// As elements of T take it.
template <class T>
struct DirectionOf {
  AffineOf<T> affine;  // to recompute z
  float along, constant;

  DirectionOf() = default;
  BATCHOPS_DEVICE explicit DirectionOf(const Direction& d)
      : affine({d.mean, d.scale, d.shift}),
        along(d.along),
        constant(kFolded<T> ? d.constant_of_x() : d.constant) {}
  BATCHOPS_DEVICE float rest(float x) const {
    return __fmaf_rn(along, affine.centred(x), constant);
  }
};

// Directions of a tile's channels, see FieldTable.
template <class T, int kTile>
class DirectionTable {
  AffineTable<T, kTile> affines_;
  FieldTable<2, kTile> rest_;

 public:
  static constexpr int kAtOnce = AffineTable<T, kTile>::kAtOnce;

  BATCHOPS_DEVICE void set(int channel, const DirectionOf<T>& d) {
    affines_.set(channel, d.affine);
    rest_.set(channel, {d.along, d.constant});
  }
  BATCHOPS_DEVICE void get(int unit, int half, DirectionOf<T> (&to)[kAtOnce]) const {
    AffineOf<T> affine[kAtOnce];
    float along[kAtOnce], constant[kAtOnce];
    affines_.get(unit, half, affine);
    rest_.get(0, unit, half, along);
    rest_.get(1, unit, half, constant);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      to[j].affine = affine[j];
      to[j].along = along[j];
      to[j].constant = constant[j];
    }
  }
};

// A column's Σ dz and rstd · Σ dz · (x - mean).
struct ColumnSums {
  double bias, weight;
};

// What the forward has made of a column (a ghost batch and a channel), and the channel's
// parameters.
struct Column {
  float mean, low, rstd;
  Parameters::Pair own;

  BATCHOPS_DEVICE Affine affine() const { return own.affine(mean, low, rstd); }
};

// What becomes of the sums of a column.
struct Gradients {
  int64_t C, ghosts;
  int64_t M, last_M;   // values of a column, of one of the last ghost batch
  const float* stats;  // [3, ghosts · C]
  void* dweight;
  void* dbias;
  Parameters parameters;
  bool training;
  bool folded;  // is_folded(): sums_of makes Σ dz · x, and not Σ dz · (x - mean)

  BATCHOPS_DEVICE int64_t columns() const { return ghosts * C; }
  BATCHOPS_DEVICE Column column(int64_t ghost, int64_t c) const {
    const float* of = stats + ghost * C + c;
    return {of[0], of[columns()], of[2 * columns()], parameters.of(c)};
  }
  BATCHOPS_DEVICE Affine affine(int64_t ghost, int64_t c) const {
    return column(ghost, c).affine();
  }

  BATCHOPS_DEVICE ColumnSums sums(const Column& column, double sum, double product) const {
    const double off = folded ? static_cast<double>(column.mean) + column.low : column.low;
    const double rstd = column.rstd;
    return {sum, rstd * (product - off * sum)};
  }
  BATCHOPS_DEVICE Direction direction(const Column& column, int64_t ghost,
                                      const ColumnSums& sums) const {
    const Affine a = column.affine();
    double along = 0.0;
    double constant = 0.0;
    if (training) {
      const double low = column.low;
      const double rstd = column.rstd;
      const double values = static_cast<double>(ghost + 1 == ghosts ? last_M : M);
      along = -a.scale * rstd * sums.weight / values;
      constant = -a.scale * sums.bias / values - along * low;
    }
    return {a.mean, a.scale, static_cast<float>(along), static_cast<float>(constant), a.shift};
  }
  // With the sums of all samples.
  BATCHOPS_DEVICE void store(int64_t c, const ColumnSums& sums) const {
    if (dbias != nullptr) store_as(dbias, parameters.dtype, c, sums.bias);
    if (dweight != nullptr) store_as(dweight, parameters.dtype, c, sums.weight);
  }
};

inline Gradients gradients_of(const BatchNormBackward& args, const Plan& plan) {
  return {plan.C,
          plan.ghosts,
          plan.samples * plan.HxW,
          plan.last_samples * plan.HxW,
          static_cast<const float*>(args.stats),
          args.dweight,
          args.dbias,
          {args.weight, args.bias, args.shape.param_dtype},
          args.training,
          is_folded(args.shape.dtype)};
}

// Whether z is made from x; the residual is read only then.
inline bool recomputes(const BatchNormBackward& args) {
  return args.mask == nullptr && traits_of(args.shape.activation).needs_z;
}

// The tensors; the residual is null unless z is made from it.
struct Tensors {
  const void* dy;
  const void* x;
  const void* residual;
  const uint8_t* mask;
  void* dx;
  void* dresidual;
  int64_t mask_row;  // bytes
  bool along_x;      // dx depends on x

  Tensors(const BatchNormBackward& args, const Plan& plan)
      : dy(args.dy),
        x(args.x),
        residual(recomputes(args) ? args.residual : nullptr),
        mask(args.mask),
        dx(args.dx),
        dresidual(args.dresidual),
        mask_row(mask_row_bytes(plan.row())),
        along_x(args.training && args.dx != nullptr) {}
};

// Only this instance looks for a residual: so the others stay as small as they are.
template <class Act>
constexpr bool kMayAdd = kAnyActivation<Act>;

// Some of a unit's elements.
template <class T, int W, int kCount>
BATCHOPS_DEVICE void to_floats(const Unit<T, W>& unit, int first, float (&to)[kCount]) {
  float all[W];
  to_float<T, W>(unit, all);
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = all[first + j];
}

// What a thread loads of one place.
template <class T, int W>
struct Loaded {
  Unit<T, W> dy, x, residual;
  unsigned bits;
};

// What fetches dy, x and residual of a place from memory.
template <class T, int W, bool kAdds>
struct Fetch {
  const T* __restrict__ dy;
  const T* __restrict__ x;
  const T* __restrict__ residual;

  BATCHOPS_DEVICE explicit Fetch(const Tensors& args)
      : dy(static_cast<const T*>(args.dy)),
        x(static_cast<const T*>(args.x)),
        residual(static_cast<const T*>(args.residual)) {}
  BATCHOPS_DEVICE void operator()(const Place& place, Loaded<T, W>& to) const {
    to.dy = load_unit<T, W>(dy + place.offset);
    to.x = load_unit<T, W>(x + place.offset);
    if (kAdds && residual != nullptr) to.residual = load_unit<T, W>(residual + place.offset);
  }
};

// Makes dz of a unit's dy: from its bits of the mask, or from z = affine(j)(x) + residual.
template <class Act, int W, class AffineOf>
BATCHOPS_DEVICE void differentiate(const Act& act, float (&dy)[W], const float (&x)[W],
                                   const float (&residual)[W], AffineOf affine, bool masked,
                                   bool adds, unsigned bits) {
  if constexpr (Act::kNeedsZ) {
    if (masked) {
#pragma unroll
      for (int j = 0; j < W; ++j) dy[j] = act.backward_bits(dy[j], bits >> j & 1u);
    } else {
      float z[W];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        z[j] = affine(j)(x[j]);
        if (kMayAdd<Act> && adds) z[j] = __fadd_rn(z[j], residual[j]);
      }
      for_each_element(act, dy, z, [](auto functor, float gradient, float of) {
        return functor.backward(gradient, of);
      });
    }
  }
}

// Of a table what gives the coefficients of a unit's elements first … first + 3. They are read
// again each time, and not kept in registers.
template <class Coefficients, class Table>
BATCHOPS_DEVICE auto four_of(const Table& table, int unit, int first) {
  struct Four {
    Coefficients of[Table::kAtOnce];
    BATCHOPS_DEVICE Coefficients operator()(int j) const { return of[j]; }
  } four;
  table.get(forgotten(unit), first / Table::kAtOnce, four.of);
  return four;
}
// What gives the coefficients of channels first, first + 1 … of a thread: of `affine`, or of the
// table where registers are short.
template <int W, class Table, class T, int kHeld, class MyChunk>
BATCHOPS_DEVICE auto affines_of(const Table& table, const AffineOf<T> (&affine)[kHeld],
                                const MyChunk& chunk) {
  if constexpr (std::is_class_v<Table>) {
    return [&](int first) { return four_of<AffineOf<T>>(table, chunk.local(0) / W, first); };
  } else {
    return [&](int) { return [&](int j) { return affine[j % kHeld]; }; };
  }
}

// A unit's bits of the mask, as the chunk walks it.
template <class MyChunk>
BATCHOPS_DEVICE unsigned bits_of(const MyChunk&, const uint8_t* mask, int64_t row_bytes,
                                 const Place& place) {
  return load_mask<MyChunk::kWidth>(mask, row_bytes, place);
}
template <int W>
BATCHOPS_DEVICE unsigned bits_of(const PlanesChunk<W>& chunk, const uint8_t* mask,
                                 int64_t row_bytes, const Place& place) {
  const uint8_t* row = mask + place.row * row_bytes;
  const int64_t byte = place.column / 8;
  const int bit = static_cast<int>(place.column % 8);
  const int own = chunk.split < W ? chunk.split : W;
  unsigned bits = row[byte];
  if (bit + own > 8) bits |= unsigned{row[byte + 1]} << 8;
  bits >>= bit;
  if (own == W) return bits;
  return (bits & ((1u << chunk.split) - 1u)) | unsigned{row[row_bytes]} << chunk.split;
}

// The sums Σ dz and Σ dz · (x - mean), see Gradients::folded, of a chunk for the thread's
// channels, in those that write them. affines(first) gives what gives the coefficients of its
// channel first + j; get(i, place, loaded) fetches dy, x and residual of the thread's i-th unit,
// which lies at place(), and ready(batch) comes before those of a batch. kShort: the chunk is too
// short for the errors of a plain sum to grow.
template <class T, int kAhead, bool kShort, class MyChunk, class Act, class Affines, class Ready,
          class Get>
BATCHOPS_DEVICE void sums_of(const MyChunk& chunk, const Tensors& args, const Act& act,
                             Affines affines, Ready ready, Get get,
                             typename MyChunk::Scratch& scratch,
                             float (&sums)[2][MyChunk::kChannels]) {
  constexpr int W = MyChunk::kWidth;
  constexpr int kChannels = MyChunk::kChannels;
  const uint8_t* __restrict__ mask = args.mask;
  const bool adds = kMayAdd<Act> && args.residual != nullptr;

#pragma unroll
  for (int j = 0; j < kChannels; ++j) sums[0][j] = sums[1][j] = 0.0f;
  for (int batch = 0; batch < chunk.batches(); ++batch) {
    ready(batch);
    float of_batch[2][kShort ? 1 : kChannels] = {};
#pragma unroll 1
    for (int part = 0; part < kInFlight; part += kAhead) {
      Loaded<T, W> loaded[kAhead];
      bool valid[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        loaded[u].bits = 0;
        valid[u] = use_unit(chunk, batch, part + u, [&](const auto& place) {
          get(batch * kInFlight + part + u, place, loaded[u]);
          if (Act::kNeedsZ && mask != nullptr) {
            loaded[u].bits = bits_of(chunk, mask, args.mask_row, place());
          }
        });
      }
      constexpr int kAtOnce = MyChunk::kAtOnce;
#pragma unroll
      for (int first = 0; first < W; first += kAtOnce) {
        const auto affine = affines(first);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (!valid[u]) continue;
          float dz[kAtOnce];
          float v[kAtOnce];
          float r[kAtOnce] = {};
          to_floats(loaded[u].dy, first, dz);
          to_floats(loaded[u].x, first, v);
          if (adds) to_floats(loaded[u].residual, first, r);
          differentiate(act, dz, v, r, affine, mask != nullptr, adds, loaded[u].bits >> first);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int c = (first + j) % kChannels;
            (kShort ? sums[0][c] : of_batch[0][kShort ? 0 : c]) += dz[j];
            (kShort ? sums[1][c] : of_batch[1][kShort ? 0 : c]) += dz[j] * affine(j).centred(v[j]);
          }
        }
      }
    }
    if constexpr (!kShort) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        sums[0][j] += of_batch[0][j];
        sums[1][j] += of_batch[1][j];
      }
    }
  }
  chunk.template sum<false>(sums, scratch);
}

// dx and dresidual of `kAhead` units. load(u, place, loaded) fetches dy, x and residual,
// directions(u, first) gives what gives the coefficients of elements first … first + kAtOnce - 1,
// bits(place) a unit's bits of the mask.
template <class T, int W, int kAhead, int kAtOnce, class Act, class Load, class Directions,
          class Bits>
BATCHOPS_DEVICE void propagate(const Tensors& args, const Act& act, const Place (&places)[kAhead],
                               Load load, Directions directions, Bits bits) {
  const uint8_t* __restrict__ mask = args.mask;
  T* __restrict__ dx = static_cast<T*>(args.dx);
  T* __restrict__ dresidual = static_cast<T*>(args.dresidual);
  const bool adds = kMayAdd<Act> && args.residual != nullptr;
  Loaded<T, W> loaded[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    loaded[u].bits = 0;
    if (!places[u].valid) continue;
    load(u, places[u], loaded[u]);
    if (Act::kNeedsZ && mask != nullptr) {
      loaded[u].bits = bits(places[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (!places[u].valid) continue;
    float dz[W];
    to_float<T, W>(loaded[u].dy, dz);
    if constexpr (Act::kNeedsZ) {
#pragma unroll
      for (int first = 0; first < W; first += kAtOnce) {
        const auto direction_of = directions(u, first);
        float of[kAtOnce], v[kAtOnce], r[kAtOnce] = {};
        to_floats(loaded[u].dy, first, of);
        to_floats(loaded[u].x, first, v);
        if (adds) to_floats(loaded[u].residual, first, r);
        differentiate(
            act, of, v, r, [&](int j) { return direction_of(j).affine; }, mask != nullptr, adds,
            loaded[u].bits >> first);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) dz[first + j] = of[j];
      }
    }
    if (dresidual != nullptr) store_unit<T, W>(dresidual + places[u].offset, dz);
    if (dx == nullptr) continue;
#pragma unroll
    for (int first = 0; first < W; first += kAtOnce) {
      const auto direction_of = directions(u, first);
      // In eval x may be inf or NaN without any effect on dx.
      float rest[kAtOnce] = {};
      if (args.along_x) {
        float v[kAtOnce];
        to_floats(loaded[u].x, first, v);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) rest[j] = direction_of(j).rest(v[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        dz[first + j] = __fmaf_rn(direction_of(j).affine.scale, dz[first + j], rest[j]);
      }
    }
    store_unit<T, W>(dx + places[u].offset, dz);
  }
}
// The same; a unit's bits of the mask lie in one byte.
template <class T, int W, int kAhead, int kAtOnce, class Act, class Load, class Directions>
BATCHOPS_DEVICE void propagate(const Tensors& args, const Act& act, const Place (&places)[kAhead],
                               Load load, Directions directions) {
  propagate<T, W, kAhead, kAtOnce>(args, act, places, load, directions, [&](const Place& place) {
    return load_mask<W>(args.mask, args.mask_row, place);
  });
}

// The slots of `plan`'s chunks added up: directions of columns, gradients of channels.
struct GradientFinishArguments {
  const float2* sums;  // [C, slots]
  int64_t chunks, slots;
  bool sums_known;  // else there are none, and only directions are wanted
  int lanes;
  float4* direction;  // [ghosts · C]: mean, scale, along, constant; may be null
  float* shift;       // [ghosts · C]
  Gradients gradients;
};

const char* backward_finish(const GradientFinishArguments& args, int device, void* stream);

// Reads dy and x once, if the device has room; `done` says whether it did anything.
const char* backward_resident(const BatchNormBackward& args, const Plan& plan, void* workspace,
                              int device, void* stream, bool& done);
size_t backward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool residual,
                                   const Device& device);

}  // namespace batchops::cuda
