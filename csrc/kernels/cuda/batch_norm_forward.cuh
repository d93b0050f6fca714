// What the kernels of batch norm's forward share, and the way to those that read x once.
#pragma once
#include <cfloat>

#include "kernels/cuda/batch_norm.cuh"

namespace batchops::cuda {

constexpr const char* kForward = "batch_norm_forward_cuda";

// What becomes of the statistics of a column (a ghost batch and a channel c).
struct Statistics {
  int64_t C, ghosts;
  int64_t M, last_M;  // values of a column, of one of the last ghost batch
  int64_t all;        // values of a channel
  float* stats;       // [3, ghosts · C]
  void* running_mean;
  void* running_var;
  DType running_dtype;
  Parameters parameters;
  double momentum;
  double eps;

  BATCHOPS_DEVICE int64_t count(int64_t ghost) const { return ghost + 1 == ghosts ? last_M : M; }
  __host__ __device__ bool runs() const {
    return running_mean != nullptr || running_var != nullptr;
  }

  BATCHOPS_DEVICE Affine affine(int64_t ghost, int64_t c) const {
    const int64_t columns = ghosts * C;
    const float* column = stats + ghost * C + c;
    return parameters.of(c).affine(column[0], column[columns], column[2 * columns]);
  }
  BATCHOPS_DEVICE Affine store(int64_t ghost, int64_t c, double mean, double variance) const {
    return store(ghost, c, mean, variance, parameters.of(c), true);
  }
  // `own`: the channel's parameters; `writes`: into stats; everyone gets the coefficients.
  BATCHOPS_DEVICE Affine store(int64_t ghost, int64_t c, double mean, double variance,
                               const Parameters::Pair& own, bool writes) const {
    const int64_t columns = ghosts * C;
    float* column = stats + ghost * C + c;
    const float high = static_cast<float>(mean);
    // What float has no room for is infinite, and has no low part.
    const float low = fabsf(high) <= FLT_MAX ? static_cast<float>(mean - high) : 0.0f;
    const float rstd = static_cast<float>(inverse_root(variance + eps));
    if (writes) {
      column[0] = high;
      column[columns] = low;
      column[2 * columns] = rstd;
    }
    return own.affine(high, low, rstd);
  }
  // With the statistics of all samples.
  BATCHOPS_DEVICE void update(int64_t c, double mean, double square) const {
    if (running_mean != nullptr) {
      const double before = load_as_double(running_mean, running_dtype, c);
      store_as(running_mean, running_dtype, c, before + momentum * (mean - before));
    }
    if (running_var != nullptr) {
      const double unbiased = square / static_cast<double>(all > 1 ? all - 1 : 1);
      const double before = load_as_double(running_var, running_dtype, c);
      store_as(running_var, running_dtype, c, before + momentum * (unbiased - before));
    }
  }
};

inline Statistics statistics_of(const BatchNormForward& args, const Plan& plan) {
  return {plan.C,
          plan.ghosts,
          plan.samples * plan.HxW,
          plan.last_samples * plan.HxW,
          plan.per_channel(),
          static_cast<float*>(args.stats),
          args.running_mean,
          args.running_var,
          args.shape.running_dtype,
          {args.weight, args.bias, args.shape.param_dtype},
          args.momentum,
          args.eps};
}

// Whether rows are walked as the mask's are. Not only where one is wanted: so the statistics have
// the same bits either way.
inline bool walks_mask(const BatchNormForward& args) {
  return args.mask != nullptr ||
         (args.residual != nullptr && traits_of(args.shape.activation).maskable);
}

// Moments of a chunk: write(j, moments) takes those of the thread's j-th channel where it writes
// them. get(i, place) gives the thread's i-th unit, which lies at place(), and ready(batch) comes
// before those of a batch.
// kShort: the chunk is too short for the errors of a plain sum to grow.
template <bool kShort, class T, class MyChunk, class Ready, class Get, class Write>
BATCHOPS_DEVICE void moments_of(const MyChunk& chunk, Ready ready, Get get,
                                typename MyChunk::Scratch& scratch, Write write) {
  constexpr int W = MyChunk::kWidth;
  constexpr int kChannels = MyChunk::kChannels;
  Unit<T, W> units[kInFlight];
  if constexpr (!kShort) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) units[u] = zero_unit<T, W>();
  }
  bool valid[kInFlight];
  const auto load = [&](int batch) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      units[u] = zero_unit<T, W>();
      valid[u] = use_unit(chunk, batch, u,
                          [&](const auto& place) { units[u] = get(batch * kInFlight + u, place); });
    }
  };

  float shift[1][kChannels] = {};
  float sums[2][kChannels] = {};
  for (int batch = 0;;) {
    // Where no unit has to be asked whether it is valid.
    bool full = false;
    if constexpr (!kShort) full = chunk.is_full(batch);
    ready(batch);
    if (!full) {
      load(batch);
    } else if (chunk.active) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        units[u] = get(batch * kInFlight + u, [&] { return chunk.place(batch, u); });
      }
    }
    if (batch == 0) {
      // The shift is the mean of the chunk's first elements: close to the chunk's own mean whatever
      // the offset, and an outlier among them moves it by a small part of itself only.
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        float v[W];
        to_float<T, W>(units[u], v);
#pragma unroll
        for (int j = 0; j < W; ++j) shift[0][j % kChannels] += v[j];
      }
      chunk.template sum<true>(shift, scratch);
      // One division costs registers, which kernels with short chunks do not have.
      const float count = static_cast<float>(chunk.first_count());
      const float part = kShort ? 0.0f : 1.0f / count;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        shift[0][j] = kShort ? shift[0][j] / count : shift[0][j] * part;
      }
    }
    // Over the batch before the sums over the chunk, so that their errors do not grow; unless the
    // chunk is short, or this its only batch that is not full.
    if (!full) {
      constexpr bool kAtOnce = kShort || kChannels > 1;
      float of_batch[2] = {};
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (!valid[u]) continue;
        float v[W];
        to_float<T, W>(units[u], v);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float d = v[j] - shift[0][j % kChannels];
          (kAtOnce ? sums[0][j % kChannels] : of_batch[0]) += d;
          (kAtOnce ? sums[1][j % kChannels] : of_batch[1]) += d * d;
        }
      }
      if constexpr (!kAtOnce) {
        sums[0][0] += of_batch[0];
        sums[1][0] += of_batch[1];
      }
    } else {
      float v[kInFlight][W];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) to_float<T, W>(units[u], v[u]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float of_batch[2] = {};
#pragma unroll
        for (int i = 0; i < kInFlight * W / kChannels; ++i) {
          const float d = v[i * kChannels / W][i * kChannels % W + c] - shift[0][c];
          of_batch[0] = i == 0 ? d : of_batch[0] + d;
          of_batch[1] = i == 0 ? d * d : of_batch[1] + d * d;
        }
        sums[0][c] += of_batch[0];
        sums[1][c] += of_batch[1];
      }
    }
    if (++batch >= chunk.batches()) break;
  }
  chunk.template sum<false>(sums, scratch);
  if (!kShort && !chunk.writes_any()) return;

  const float n = static_cast<float>(chunk.count());
  const float part = 1.0f / n;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    const float rest = sums[1][j] - sums[0][j] * (sums[0][j] * part);
    if (!chunk.writes(j)) continue;
    write(j, Moments{shift[0][j], sums[0][j], rest < 0.0f ? 0.0f : rest, n});  // a NaN stays
  }
}

// What the elementwise half needs besides x.
struct Elementwise {
  const void* residual;
  void* y;
  uint8_t* mask;
  int64_t mask_row;  // bytes

  Elementwise(const BatchNormForward& args, const Plan& plan)
      : residual(args.residual), y(args.y), mask(args.mask), mask_row(mask_row_bytes(plan.row())) {}
};

// y of `kAhead` units; all lanes of a warp together. What is the same for all elements is asked
// once a unit. load(u, place) gives a unit of x, affine_of(u, j) the coefficients of its element j;
// store(u, place, bits) takes its bits of the mask.
template <class T, int W, int kAhead, class Act, class Load, class AffineOf, class Store>
BATCHOPS_DEVICE void normalise(const Elementwise& args, const Act& act,
                               const Place (&places)[kAhead], Load load, AffineOf affine_of,
                               Store store) {
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  T* __restrict__ y = static_cast<T*>(args.y);
  Unit<T, W> units[kAhead];
  Unit<T, W> residuals[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (!places[u].valid) continue;
    units[u] = load(u, places[u]);
    if (residual != nullptr) residuals[u] = load_unit<T, W>(residual + places[u].offset);
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    unsigned bits = 0;
    if (places[u].valid) {
      float v[W];
      to_float<T, W>(units[u], v);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = affine_of(u, j)(v[j]);
      if (residual != nullptr) {
        float r[W];
        to_float<T, W>(residuals[u], r);
#pragma unroll
        for (int j = 0; j < W; ++j) v[j] = __fadd_rn(v[j], r[j]);
      }
      if constexpr (Act::kMaskable) {
        if (args.mask != nullptr) {
#pragma unroll
          for (int j = 0; j < W; ++j) {
            if (!(act.mask_source(v[j]) <= 0.0f)) bits |= 1u << j;
          }
        }
      }
      float none[W] = {};
      for_each_element(act, v, none,
                       [](auto functor, float z, float) { return functor.forward(z); });
      store_unit<T, W>(y + places[u].offset, v);
    }
    if (Act::kMaskable && args.mask != nullptr) store(u, places[u], bits);
  }
}
// The same; each unit's bits go to the mask at once.
template <class T, int W, int kAhead, class Act, class Load, class AffineOf>
BATCHOPS_DEVICE void normalise(const Elementwise& args, const Act& act,
                               const Place (&places)[kAhead], Load load, AffineOf affine_of) {
  normalise<T, W, kAhead>(args, act, places, load, affine_of,
                          [&](int, const Place& place, unsigned bits) {
                            store_mask<W>(args.mask, args.mask_row, place, bits);
                          });
}

// The slots of `plan`'s chunks merged, the running statistics updated; or, where something is
// known already, what follows from it.
enum class Known : int {
  chunks,   // moments of each chunk
  columns,  // moments of each column, and `stats` is written: only the running statistics are left
  stats,    // `stats`
  running,  // eval
};

struct FinishArguments {
  Known known;
  const Moments* moments;  // [C, slots]
  int64_t chunks, slots;
  int lanes;
  float4* affine;  // [ghosts · C]: mean, scale, shift; may be null
  Statistics statistics;
};

const char* forward_finish(const FinishArguments& args, int device, void* stream);

// Reads x once, if the device has room; `done` says whether it did anything.
const char* forward_resident(const BatchNormForward& args, const Plan& plan, void* workspace,
                             int device, void* stream, bool& done);
size_t forward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool mask,
                                  const Device& device);

}  // namespace batchops::cuda
