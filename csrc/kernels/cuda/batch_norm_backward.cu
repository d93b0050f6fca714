// Batch norm backward. With dz = dy · activation'(z):
//
//   partials:  Σ dz and Σ dz · (x - mean) of each chunk               reads dy, x (and the mask)
//   finish:    dbias = Σ dz,  dweight = rstd · (Σ dz · (x - mean) - mean_low · Σ dz)
//   apply:     dx = scale · dz + along · (x - mean) + constant        reads dy, x, writes dx
//
// where in training  along = -scale · rstd · dweight / M,  constant = -scale · dbias / M
// - along · mean_low, and in eval both are 0. z is recomputed from x, and from the residual where
// there is one, unless there is a mask.
#include "kernels/cuda/batch_norm.cuh"

namespace batchops::cuda {
namespace {

// What becomes of a channel's sums.
struct Gradients {
  int64_t C, M;
  const float* stats;  // [3, C]
  float4* direction;   // [C]: mean, scale, along, constant
  float* shift;        // [C]: Affine::shift, to recompute z
  void* dweight;
  void* dbias;
  Parameters parameters;
  bool training;

  BATCHOPS_DEVICE Affine affine(int64_t c) const {
    return parameters.affine(c, stats[c], stats[C + c], stats[2 * C + c]);
  }

  BATCHOPS_DEVICE void store(int64_t c, double sum, double product) const {
    const Affine a = affine(c);
    const double low = stats[C + c];
    const double rstd = stats[2 * C + c];
    const double gradient = rstd * (product - low * sum);
    if (dbias != nullptr) store_as(dbias, parameters.dtype, c, sum);
    if (dweight != nullptr) store_as(dweight, parameters.dtype, c, gradient);
    double along = 0.0;
    double constant = 0.0;
    if (training) {
      along = -a.scale * rstd * gradient / static_cast<double>(M);
      constant = -a.scale * sum / static_cast<double>(M) - along * low;
    }
    direction[c] =
        make_float4(a.mean, a.scale, static_cast<float>(along), static_cast<float>(constant));
    shift[c] = a.shift;
  }
};

// Only this instance looks for a residual: so the others stay as small as they are.
template <class Act>
constexpr bool kMayAdd = kAnyActivation<Act>;

// Makes dz of a unit's dy: from its bits of the mask, or from z = affine(j)(x) + residual.
template <class Act, int W, class AffineOf>
BATCHOPS_DEVICE void differentiate(const Act& act, float (&dy)[W], const float (&x)[W],
                                   const float (&residual)[W], AffineOf affine, bool masked,
                                   bool adds, unsigned bits) {
  if constexpr (Act::kNeedsZ) {
    float z[W] = {};
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (masked) {
        dy[j] = act.backward_bits(dy[j], bits >> j & 1u);
      } else {
        z[j] = affine(j)(x[j]);
        if (kMayAdd<Act> && adds) z[j] = __fadd_rn(z[j], residual[j]);
        if constexpr (!kAnyActivation<Act>) dy[j] = act.backward(dy[j], z[j]);
      }
    }
    if constexpr (kAnyActivation<Act>) {
      if (!masked) {
        for_each_element(act, dy, z, [](auto functor, float gradient, float of) {
          return functor.backward(gradient, of);
        });
      }
    }
  }
}

struct PartialArguments {
  const void* dy;
  const void* x;
  const void* residual;  // null unless z is made from it
  const uint8_t* mask;
  float2* sums;      // [C, chunks]: Σ dz, Σ dz · (x - mean)
  int64_t mask_row;  // bytes
  ChunkGrid grid;
  Gradients gradients;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_partials(const __grid_constant__ PartialArguments args,
                                 const __grid_constant__ Act act) {
  using MyChunk = Chunk<kLayout, W>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kAhead = kLoadsAhead<Act, kChannels == 8>;
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  const T* __restrict__ dy = static_cast<const T*>(args.dy);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  const uint8_t* __restrict__ mask = args.mask;
  const bool adds = kMayAdd<Act> && residual != nullptr;

  for (int64_t piece = blockIdx.x; piece < args.grid.pieces; piece += gridDim.x) {
    const MyChunk chunk(args.grid, piece);
    Affine affine[kChannels] = {};
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (chunk.has_channel()) affine[j] = args.gradients.affine(chunk.channel_of(j));
    }

    float sums[2][kChannels] = {};
    for (int batch = 0; batch < chunk.batches(); ++batch) {
      float batch_sums[2][kChannels] = {};
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Unit<T, W> dys[kAhead];
        Unit<T, W> xs[kAhead];
        Unit<T, W> residuals[kAhead];
        unsigned bits[kAhead] = {};
        bool valid[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const Place place = chunk.place(batch, part + u);
          valid[u] = place.valid;
          if (!place.valid) continue;
          dys[u] = load_unit<T, W>(dy + place.offset);
          xs[u] = load_unit<T, W>(x + place.offset);
          if (adds) residuals[u] = load_unit<T, W>(residual + place.offset);
          if (Act::kNeedsZ && mask != nullptr) bits[u] = load_mask(mask, args.mask_row, place);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (!valid[u]) continue;
          float dz[W];
          float v[W];
          float r[W] = {};
          to_float<T, W>(dys[u], dz);
          to_float<T, W>(xs[u], v);
          if (adds) to_float<T, W>(residuals[u], r);
          differentiate(
              act, dz, v, r, [&](int j) { return affine[j % kChannels]; }, mask != nullptr, adds,
              bits[u]);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            batch_sums[0][j % kChannels] += dz[j];
            batch_sums[1][j % kChannels] += dz[j] * (v[j] - affine[j % kChannels].mean);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        sums[0][j] += batch_sums[0][j];
        sums[1][j] += batch_sums[1][j];
      }
    }
    chunk.sum(sums, scratch);

    if (!chunk.writes()) continue;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int64_t c = chunk.channel_of(j);
      if (args.grid.chunks == 1) {
        args.gradients.store(c, sums[0][j], sums[1][j]);
      } else {
        args.sums[c * args.grid.chunks + chunk.index] = make_float2(sums[0][j], sums[1][j]);
      }
    }
  }
}

struct FinishArguments {
  const float2* sums;
  int64_t chunks;  // 0: nothing was summed
  Gradients gradients;
};

// A warp a channel; each lane adds every 32nd chunk in turn.
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_finish(const __grid_constant__ FinishArguments args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t c = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
       c < args.gradients.C; c += warps) {
    const float2* __restrict__ sums = args.sums + c * args.chunks;
    double sum = 0.0;
    double product = 0.0;
    for (int64_t k = lane; k < args.chunks; k += kWarp) {
      const float2 s = sums[k];
      sum += s.x;
      product += s.y;
    }
    sum = warp_sum(sum);
    product = warp_sum(product);
    if (lane == 0) args.gradients.store(c, sum, product);
  }
}

struct ApplyArguments {
  const void* dy;
  const void* x;
  const void* residual;  // null unless z is made from it
  const uint8_t* mask;
  void* dx;
  void* dresidual;
  const float4* direction;
  const float* shift;
  int64_t mask_row;  // bytes
  bool reads_x;      // dx depends on x, or z is recomputed
  bool along_x;      // dx depends on x
  ApplyGrid grid;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_apply(const __grid_constant__ ApplyArguments args,
                              const __grid_constant__ Act act) {
  constexpr bool kChannelsLast = kLayout == Layout::channels_last;
  constexpr int kAhead = kLoadsAhead<Act, (kChannelsLast && W == 8)>;
  const T* __restrict__ dy = static_cast<const T*>(args.dy);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  const uint8_t* __restrict__ mask = args.mask;
  const float4* __restrict__ direction = args.direction;
  const float* __restrict__ shift = args.shift;
  T* __restrict__ dx = static_cast<T*>(args.dx);
  T* __restrict__ dresidual = static_cast<T*>(args.dresidual);
  const bool recompute = Act::kNeedsZ && mask == nullptr;
  const bool adds = kMayAdd<Act> && residual != nullptr;

  for (int64_t i = blockIdx.x; i < args.grid.pieces; i += gridDim.x) {
    const Piece<kLayout, W> piece(args.grid, args.grid.pieces - 1 - i);
    constexpr int kSets = kChannelsLast ? W : kAhead;
    float4 of_channel[kSets];
    float shift_of[kSets] = {};
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (!piece.active) continue;
        of_channel[j] = direction[piece.column + j];
        if (recompute) shift_of[j] = shift[piece.column + j];
      }
    }
    for (int batch = 0; batch < piece.batches(); ++batch) {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Place places[kAhead];
        Unit<T, W> dys[kAhead];
        Unit<T, W> xs[kAhead];
        Unit<T, W> residuals[kAhead];
        unsigned bits[kAhead] = {};
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          int64_t channel;
          places[u] = piece.place(batch, part + u, channel);
          xs[u] = zero_unit<T, W>();
          if (!places[u].valid) continue;
          dys[u] = load_unit<T, W>(dy + places[u].offset);
          if (args.reads_x) xs[u] = load_unit<T, W>(x + places[u].offset);
          if (adds) residuals[u] = load_unit<T, W>(residual + places[u].offset);
          if (Act::kNeedsZ && mask != nullptr) bits[u] = load_mask(mask, args.mask_row, places[u]);
          if constexpr (!kChannelsLast) {
            of_channel[u] = direction[channel];
            if (recompute) shift_of[u] = shift[channel];
          }
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (!places[u].valid) continue;
          float dz[W];
          float v[W];
          float r[W] = {};
          to_float<T, W>(dys[u], dz);
          to_float<T, W>(xs[u], v);
          if (adds) to_float<T, W>(residuals[u], r);
          differentiate(
              act, dz, v, r,
              [&](int j) {
                const float4 d = of_channel[kChannelsLast ? j : u];
                return Affine{d.x, d.y, shift_of[kChannelsLast ? j : u]};
              },
              mask != nullptr, adds, bits[u]);
          if (dresidual != nullptr) store_unit<T, W>(dresidual + places[u].offset, dz);
          if (dx == nullptr) continue;
#pragma unroll
          for (int j = 0; j < W; ++j) {
            const float4 d = of_channel[kChannelsLast ? j : u];
            // In eval x may be inf or NaN without any effect on dx.
            const float rest = args.along_x ? __fmaf_rn(d.z, __fsub_rn(v[j], d.x), d.w) : 0.0f;
            dz[j] = __fmaf_rn(d.y, dz[j], rest);
          }
          store_unit<T, W>(dx + places[u].offset, dz);
        }
      }
    }
  }
}

// The workspace: direction [C] float4, sums [C, chunks] float2, shift [C] float.
size_t workspace_bytes(const Plan& plan) {
  const int64_t sums = plan.chunks > 1 ? plan.C * plan.chunks : 0;
  return static_cast<size_t>(plan.C) * (sizeof(float4) + sizeof(float)) +
         static_cast<size_t>(sums) * sizeof(float2);
}

constexpr const char* kOperation = "batch_norm_backward_cuda";

const char* validate(const BatchNormBackward& args, const void* workspace) {
  const BatchNormShape& shape = args.shape;
  if (shape.N < 0 || shape.C < 0 || shape.HxW < 0) {
    return message("%s: N, C and HxW must not be negative", kOperation);
  }
  if (shape.C >= int64_t{1} << 30) {
    return message("%s: expected C < 2^30, got %lld", kOperation, static_cast<long long>(shape.C));
  }
  if (args.dy == nullptr || args.x == nullptr || args.stats == nullptr || workspace == nullptr) {
    return message("%s: dy, x, stats and workspace must not be null", kOperation);
  }
  return check_mask(kOperation, shape.activation, args.mask);
}

const char* backward(const BatchNormBackward& args, void* workspace, int device, void* stream) {
  const BatchNormShape& shape = args.shape;
  const bool wants_sums =
      args.dweight != nullptr || args.dbias != nullptr || (args.training && args.dx != nullptr);
  const bool wants_elements = args.dx != nullptr || args.dresidual != nullptr;
  if (!wants_sums && !wants_elements) return nullptr;

  const bool recompute = args.mask == nullptr && traits_of(shape.activation).needs_z;
  const void* residual = recompute ? args.residual : nullptr;
  const Plan plan = make_plan(shape, args.mask != nullptr);
  auto* direction = static_cast<float4*>(workspace);
  auto* sums = reinterpret_cast<float2*>(direction + plan.C);
  auto* shift = reinterpret_cast<float*>(sums + (plan.chunks > 1 ? plan.C * plan.chunks : 0));
  const int64_t mask_row = mask_row_bytes(plan.row());
  const Gradients gradients{plan.C,
                            plan.per_channel(),
                            static_cast<const float*>(args.stats),
                            direction,
                            shift,
                            args.dweight,
                            args.dbias,
                            {args.weight, args.bias, shape.param_dtype},
                            args.training};

  const auto with_types = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    using Act = decltype(act);
    int64_t blocks = 0;

    if (wants_sums) {
      const PartialArguments partials{args.dy, args.x,   residual,           args.mask,
                                      sums,    mask_row, ChunkGrid(plan, W), gradients};
      if (const char* error = grid_size(kOperation, device, partials.grid.pieces, blocks)) {
        return error;
      }
      if (const char* error = launch("batch_norm_backward_partials",
                                     batch_norm_backward_partials<T, kLayout, W, Act>, blocks,
                                     kThreads, 0, stream, partials, act)) {
        return error;
      }
    }
    if (!wants_sums || plan.chunks > 1) {
      const FinishArguments finish{sums, wants_sums ? plan.chunks : 0, gradients};
      const int64_t pieces = ceil_divide<int64_t>(plan.C, kThreads / kWarp);
      if (const char* error = grid_size(kOperation, device, pieces, blocks)) return error;
      if (const char* error = launch("batch_norm_backward_finish", batch_norm_backward_finish,
                                     blocks, kThreads, 0, stream, finish)) {
        return error;
      }
    }
    if (!wants_elements) return nullptr;
    const bool along_x = args.training && args.dx != nullptr;
    const bool reads_x = along_x || recompute;
    const ApplyArguments apply{args.dy,  args.x,         residual,  args.mask,
                               args.dx,  args.dresidual, direction, shift,
                               mask_row, reads_x,        along_x,   ApplyGrid(plan, W, false)};
    if (const char* error = grid_size(kOperation, device, apply.grid.pieces, blocks)) return error;
    return launch("batch_norm_backward_apply", batch_norm_backward_apply<T, kLayout, W, Act>,
                  blocks, kThreads, 0, stream, apply, act);
  };

  return dispatch_dtype(kOperation, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_layout(plan.layout, [&](auto layout) {
      return dispatch_width<T>(
          plan.row(), {args.dy, args.x, residual, args.dx, args.dresidual}, [&](auto width) {
            const float slope = static_cast<float>(shape.slope);
            if (residual != nullptr) {
              return with_types(type, layout, width, AnyActivation{shape.activation, slope});
            }
            return with_activation<Identity, Relu>(shape.activation, slope, [&](auto act) {
              return with_types(type, layout, width, act);
            });
          });
    });
  });
}

}  // namespace
}  // namespace batchops::cuda

namespace batchops {

size_t batch_norm_backward_workspace_cuda(const BatchNormShape& shape, int) {
  if (shape.numel() == 0) return 0;
  const size_t plain = cuda::workspace_bytes(cuda::make_plan(shape, false));
  const size_t masked = cuda::workspace_bytes(cuda::make_plan(shape, true));
  return plain > masked ? plain : masked;
}

const char* batch_norm_backward_cuda(const BatchNormBackward& args, void* workspace, int device,
                                     void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  if (const char* error = cuda::validate(args, workspace)) return error;
  if (const char* error = cuda::set_device(cuda::kOperation, device)) return error;
  return cuda::backward(args, workspace, device, stream);
}

}  // namespace batchops
