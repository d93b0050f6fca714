// Batch norm forward: statistics, then y = activation((x - mean) · rstd · weight + bias +
// residual). Reads x twice in training and once in eval, writes y once (+ 1 read of the residual, +
// mask).
#include "kernels/cuda/batch_norm.cuh"

namespace batchops::cuda {
namespace {

// A chunk's statistics around a shift that lies among its values, so that neither sum cancels.
struct alignas(16) Moments {
  float shift;
  float sum;     // Σ (x - shift)
  float square;  // Σ (x - shift)² - sum² / n
  float unused;
};

// What becomes of a channel's statistics.
struct Statistics {
  int64_t C, M;
  float* stats;    // [3, C]
  float4* affine;  // [C]: mean, scale, shift
  void* running_mean;
  void* running_var;
  DType running_dtype;
  Parameters parameters;
  bool training;
  double momentum;
  double eps;

  BATCHOPS_DEVICE void store(int64_t c, double mean, double variance) const {
    const float high = static_cast<float>(mean);
    const float low = static_cast<float>(mean - high);
    const float rstd = static_cast<float>(1.0 / sqrt(variance + eps));
    stats[c] = high;
    stats[C + c] = low;
    stats[2 * C + c] = rstd;
    const Affine a = parameters.affine(c, high, low, rstd);
    affine[c] = make_float4(a.mean, a.scale, a.shift, 0.0f);
  }

  BATCHOPS_DEVICE void store_batch(int64_t c, double mean, double square) const {
    store(c, mean, square / static_cast<double>(M));
    if (running_mean != nullptr) {
      const double before = load_as_double(running_mean, running_dtype, c);
      store_as(running_mean, running_dtype, c, before + momentum * (mean - before));
    }
    if (running_var != nullptr) {
      const double unbiased = square / static_cast<double>(M > 1 ? M - 1 : 1);
      const double before = load_as_double(running_var, running_dtype, c);
      store_as(running_var, running_dtype, c, before + momentum * (unbiased - before));
    }
  }
};

struct PartialArguments {
  const void* x;
  Moments* moments;  // [C, chunks]
  ChunkGrid grid;
  Statistics statistics;
};

template <class T, Layout kLayout, int W>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_partials(const __grid_constant__ PartialArguments args) {
  using MyChunk = Chunk<kLayout, W>;
  constexpr int kChannels = MyChunk::kChannels;
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  const T* __restrict__ x = static_cast<const T*>(args.x);

  for (int64_t piece = blockIdx.x; piece < args.grid.pieces; piece += gridDim.x) {
    const MyChunk chunk(args.grid, piece);
    Unit<T, W> units[kInFlight];
    bool valid[kInFlight];
    const auto load = [&](int batch) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const Place place = chunk.place(batch, u);
        valid[u] = place.valid;
        units[u] = place.valid ? load_unit<T, W>(x + place.offset) : zero_unit<T, W>();
      }
    };

    load(0);
    // The shift is the mean of the chunk's first elements: close to the chunk's own mean whatever
    // the offset, and an outlier among them moves it by a small part of itself only.
    float shift[1][kChannels] = {};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      float v[W];
      to_float<T, W>(units[u], v);
#pragma unroll
      for (int j = 0; j < W; ++j) shift[0][j % kChannels] += v[j];
    }
    chunk.sum(shift, scratch);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) shift[0][j] /= static_cast<float>(chunk.first_count());

    float sums[2][kChannels] = {};
    for (int batch = 0;;) {
      float batch_sums[2][kChannels] = {};
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (!valid[u]) continue;
        float v[W];
        to_float<T, W>(units[u], v);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float d = v[j] - shift[0][j % kChannels];
          batch_sums[0][j % kChannels] += d;
          batch_sums[1][j % kChannels] += d * d;
        }
      }
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        sums[0][j] += batch_sums[0][j];
        sums[1][j] += batch_sums[1][j];
      }
      if (++batch == chunk.batches()) break;
      load(batch);
    }
    chunk.sum(sums, scratch);

    if (!chunk.writes()) continue;
    const float n = static_cast<float>(chunk.count());
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float rest = sums[1][j] - sums[0][j] * sums[0][j] / n;
      const float square = rest < 0.0f ? 0.0f : rest;  // a NaN stays
      if (args.grid.chunks == 1) {
        const double mean = shift[0][j] + static_cast<double>(sums[0][j]) / n;
        args.statistics.store_batch(chunk.channel_of(j), mean, square);
      } else {
        args.moments[chunk.channel_of(j) * args.grid.chunks + chunk.index] = {
            shift[0][j], sums[0][j], square, 0.0f};
      }
    }
  }
}

struct FinishArguments {
  const Moments* moments;
  int64_t chunk;  // elements of a channel in each but the last
  int64_t chunks;
  Statistics statistics;
};

// A warp a channel. Sums around the first chunk's mean g, in double:
//   mean = g + Σ n_k d_k / M,  Σ (x - mean)² = Σ (square_k + n_k d_k²) - (Σ n_k d_k)² / M
// where d_k = mean_k - g.
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_finish(const __grid_constant__ FinishArguments args) {
  const Statistics& s = args.statistics;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t c = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; c < s.C;
       c += warps) {
    if (!s.training) {
      if (lane == 0) {
        s.store(c, load_as_double(s.running_mean, s.running_dtype, c),
                load_as_double(s.running_var, s.running_dtype, c));
      }
      continue;
    }
    const Moments* __restrict__ moments = args.moments + c * args.chunks;
    const double g = static_cast<double>(moments[0].shift) +
                     static_cast<double>(moments[0].sum) / static_cast<double>(args.chunk);
    double first = 0.0;
    double second = 0.0;
    for (int64_t k = lane; k < args.chunks; k += kWarp) {
      const Moments m = moments[k];
      const double n = static_cast<double>(k + 1 < args.chunks ? args.chunk : s.M - k * args.chunk);
      const double nd = n * (m.shift - g) + m.sum;
      first += nd;
      second += m.square + nd * nd / n;
    }
    first = warp_sum(first);
    second = warp_sum(second);
    if (lane == 0) {
      const double M = static_cast<double>(s.M);
      const double square = second - first * first / M;
      s.store_batch(c, g + first / M, square < 0.0 ? 0.0 : square);
    }
  }
}

struct ApplyArguments {
  const void* x;
  const void* residual;
  void* y;
  uint8_t* mask;
  const float4* affine;
  int64_t mask_row;  // bytes
  ApplyGrid grid;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_apply(const __grid_constant__ ApplyArguments args, const __grid_constant__ Act act) {
  constexpr bool kChannelsLast = kLayout == Layout::channels_last;
  constexpr int kAhead = kLoadsAhead<Act>;
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  const float4* __restrict__ affine = args.affine;
  T* __restrict__ y = static_cast<T*>(args.y);

  for (int64_t i = blockIdx.x; i < args.grid.pieces; i += gridDim.x) {
    const Piece<kLayout, W> piece(args.grid, args.grid.pieces - 1 - i);
    float4 of_channel[kChannelsLast ? W : kAhead];
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (piece.active) of_channel[j] = affine[piece.column + j];
      }
    }
    for (int batch = 0; batch < piece.batches(); ++batch) {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Place places[kAhead];
        Unit<T, W> units[kAhead];
        Unit<T, W> residuals[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          int64_t channel;
          places[u] = piece.place(batch, part + u, channel);
          if (!places[u].valid) continue;
          units[u] = load_unit<T, W>(x + places[u].offset);
          if (residual != nullptr) residuals[u] = load_unit<T, W>(residual + places[u].offset);
          if constexpr (!kChannelsLast) of_channel[u] = affine[channel];
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          unsigned bits = 0;
          if (places[u].valid) {
            float v[W];
            float r[W] = {};
            to_float<T, W>(units[u], v);
            if (residual != nullptr) to_float<T, W>(residuals[u], r);
#pragma unroll
            for (int j = 0; j < W; ++j) {
              const float4 a = of_channel[kChannelsLast ? j : u];
              float z = Affine{a.x, a.y, a.z}(v[j]);
              if (residual != nullptr) z = __fadd_rn(z, r[j]);
              v[j] = z;
              if constexpr (Act::kMaskable) {
                if (!(act.mask_source(z) <= 0.0f)) bits |= 1u << j;
              }
            }
            for_each_element(act, v, r,
                             [](auto functor, float z, float) { return functor.forward(z); });
            store_unit<T, W>(y + places[u].offset, v);
          }
          if (Act::kMaskable && args.mask != nullptr)
            store_mask<W>(args.mask, args.mask_row, places[u], bits);
        }
      }
    }
  }
}

// The workspace: affine [C] float4, moments [C, chunks].
size_t workspace_bytes(const Plan& plan) {
  const int64_t moments = plan.chunks > 1 ? plan.C * plan.chunks : 0;
  return static_cast<size_t>(plan.C) * sizeof(float4) +
         static_cast<size_t>(moments) * sizeof(Moments);
}

constexpr const char* kOperation = "batch_norm_forward_cuda";

const char* validate(const BatchNormForward& args, const void* workspace) {
  const BatchNormShape& shape = args.shape;
  if (shape.N < 0 || shape.C < 0 || shape.HxW < 0) {
    return message("%s: N, C and HxW must not be negative", kOperation);
  }
  if (shape.C >= int64_t{1} << 30) {
    return message("%s: expected C < 2^30, got %lld", kOperation, static_cast<long long>(shape.C));
  }
  if (args.x == nullptr || args.y == nullptr || args.stats == nullptr || workspace == nullptr) {
    return message("%s: x, y, stats and workspace must not be null", kOperation);
  }
  if (!args.training && (args.running_mean == nullptr || args.running_var == nullptr)) {
    return message("%s: eval needs running_mean and running_var", kOperation);
  }
  return check_mask(kOperation, shape.activation, args.mask);
}

const char* forward(const BatchNormForward& args, void* workspace, int device, void* stream) {
  const BatchNormShape& shape = args.shape;
  const Plan plan = make_plan(shape, args.mask != nullptr);
  auto* affine = static_cast<float4*>(workspace);
  auto* moments = reinterpret_cast<Moments*>(affine + plan.C);
  const Statistics statistics{plan.C,
                              plan.per_channel(),
                              static_cast<float*>(args.stats),
                              affine,
                              args.running_mean,
                              args.running_var,
                              shape.running_dtype,
                              {args.weight, args.bias, shape.param_dtype},
                              args.training,
                              args.momentum,
                              args.eps};

  const auto with_types = [&](auto type, auto layout, auto width) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    int64_t blocks = 0;

    if (args.training) {
      const PartialArguments partials{args.x, moments, ChunkGrid(plan, W), statistics};
      if (const char* error = grid_size(kOperation, device, partials.grid.pieces, blocks)) {
        return error;
      }
      if (const char* error = launch("batch_norm_partials", batch_norm_partials<T, kLayout, W>,
                                     blocks, kThreads, 0, stream, partials)) {
        return error;
      }
    }
    if (!args.training || plan.chunks > 1) {
      const FinishArguments finish{moments, plan.chunk, plan.chunks, statistics};
      const int64_t pieces = ceil_divide<int64_t>(plan.C, kThreads / kWarp);
      if (const char* error = grid_size(kOperation, device, pieces, blocks)) return error;
      if (const char* error =
              launch("batch_norm_finish", batch_norm_finish, blocks, kThreads, 0, stream, finish)) {
        return error;
      }
    }
    const float slope = static_cast<float>(shape.slope);
    return with_activation<Identity, Relu>(shape.activation, slope, [&](auto act) -> const char* {
      using Act = decltype(act);
      const ApplyArguments apply{args.x,
                                 args.residual,
                                 args.y,
                                 args.mask,
                                 affine,
                                 mask_row_bytes(plan.row()),
                                 ApplyGrid(plan, W, args.mask != nullptr)};
      if (const char* error = grid_size(kOperation, device, apply.grid.pieces, blocks)) {
        return error;
      }
      return launch("batch_norm_apply", batch_norm_apply<T, kLayout, W, Act>, blocks, kThreads, 0,
                    stream, apply, act);
    });
  };

  return dispatch_dtype(kOperation, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_layout(plan.layout, [&](auto layout) {
      return dispatch_width<T>(plan.row(), {args.x, args.residual, args.y},
                               [&](auto width) { return with_types(type, layout, width); });
    });
  });
}

}  // namespace
}  // namespace batchops::cuda

namespace batchops {

size_t batch_norm_forward_workspace_cuda(const BatchNormShape& shape, int) {
  if (shape.numel() == 0) return 0;
  const size_t plain = cuda::workspace_bytes(cuda::make_plan(shape, false));
  const size_t masked = cuda::workspace_bytes(cuda::make_plan(shape, true));
  return plain > masked ? plain : masked;
}

const char* batch_norm_forward_cuda(const BatchNormForward& args, void* workspace, int device,
                                    void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  if (const char* error = cuda::validate(args, workspace)) return error;
  if (const char* error = cuda::set_device(cuda::kOperation, device)) return error;
  return cuda::forward(args, workspace, device, stream);
}

}  // namespace batchops
