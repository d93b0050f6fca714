// Batch norm forward: statistics, then y = activation((x - mean) · rstd · weight + bias +
// residual). Reads x twice in training, once in eval and where the statistics are known, writes y
// once (+ 1 read of the residual, + the mask). batch_norm_forward_resident.cu reads it once where
// it fits on the chip.
#include <algorithm>

#include "kernels/cuda/batch_norm_forward.cuh"

namespace batchops::cuda {
inline namespace batch_norm_forward_cu {

struct PartialArguments {
  const void* x;
  Moments* moments;  // [C, slots], or null: the only one
  float4* affine;    // then [C]
  ChunkGrid grid;
  Statistics statistics;
};

BATCHOPS_DEVICE float4 packed(const Affine& a) {
  return make_float4(a.mean, a.scale, a.shift, 0.0f);
}

template <class T, Layout kLayout, int W>
__global__ void __launch_bounds__(kThreads, kLayout == Layout::channels_first ? 4 : 3)
    batch_norm_partials(const __grid_constant__ PartialArguments args) {
  using MyChunk = Chunk<kLayout, W>;
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(of_channel, float[3][MyChunk::kMostChannels]);
  const T* __restrict__ x = static_cast<const T*>(args.x);

  for (int64_t piece = blockIdx.x; piece < args.grid.pieces; piece += gridDim.x) {
    const MyChunk chunk(args.grid, piece);
    moments_of<false, T>(
        chunk, [](int) {},
        [&](int, const auto& place) { return load_unit<T, W>(x + place().offset); }, scratch,
        [&](int j, const Moments& found) {
          of_channel[0][chunk.local(j)] = found.shift;
          of_channel[1][chunk.local(j)] = found.sum;
          of_channel[2][chunk.local(j)] = found.square;
        });
    __syncthreads();
    const int channels = forgotten(chunk.channels());
    for (int r = threadIdx.x; r < channels; r += kThreads) {
      const int64_t c = chunk.first_channel() + r;
      const Moments m{of_channel[0][r], of_channel[1][r], of_channel[2][r],
                      static_cast<float>(chunk.count())};
      if (args.moments != nullptr) {
        args.moments[c * args.grid.slots + chunk.at.slot] = m;
        continue;
      }
      const double mean = m.shift + static_cast<double>(m.sum) / m.count;
      const double square = m.square;
      args.affine[c] = packed(
          args.statistics.store(0, c, mean, square / static_cast<double>(args.statistics.all)));
      args.statistics.update(c, mean, square);
    }
  }
}

// A block a channel, or a warp, `lanes` of its lanes a ghost batch.
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_finish(const __grid_constant__ FinishArguments args) {
  constexpr int kAhead = 4;
  const Statistics& s = args.statistics;
  if (args.lanes == kThreads) {
    for (int64_t c = blockIdx.x; c < s.C; c += gridDim.x) {
      const Moments* __restrict__ moments = args.moments + c * args.slots;
      const MeanAndVariance found =
          merge_in_block<kAhead>(s.M, args.slots, [&](int64_t k) { return moments[k]; });
      // By two warps, so that neither waits for what the other loads.
      if (threadIdx.x == 0) {
        const Affine a = s.store(0, c, found.mean, found.square / static_cast<double>(s.last_M));
        if (args.affine != nullptr) args.affine[c] = packed(a);
      } else if (threadIdx.x == kWarp && s.runs()) {
        s.update(c, found.mean, found.square);
      }
    }
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t c = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; c < s.C;
       c += warps) {
    if (args.known == Known::stats || args.known == Known::running) {
      for (int64_t ghost = lane; ghost < s.ghosts; ghost += kWarp) {
        args.affine[ghost * s.C + c] =
            packed(args.known == Known::stats
                       ? s.affine(ghost, c)
                       : s.store(ghost, c, load_as_double(s.running_mean, s.running_dtype, c),
                                 load_as_double(s.running_var, s.running_dtype, c)));
      }
      continue;
    }
    const Moments* __restrict__ moments = args.moments + c * args.slots;
    double origin = 0.0;  // the first column's mean
    const int in_team = lane % args.lanes;
    double sum = 0.0;  // over columns, of their means less the origin
    double square = 0.0;
    for (int64_t first = 0; first < s.ghosts; first += kWarp / args.lanes) {
      const int64_t ghost = first + lane / args.lanes;
      const bool active = ghost < s.ghosts;
      const int64_t slot = active ? ghost * args.chunks : 0;
      const int64_t chunks = !active ? 0 : ghost + 1 < s.ghosts ? args.chunks : args.slots - slot;
      const int64_t M = s.count(ghost);
      const MeanAndVariance found = merge_ahead<kAhead>(
          M, chunks, in_team, args.lanes, [&](int64_t k) { return moments[slot + k]; },
          [&](double (&sums)[2]) {
            sums[0] = sum_of_lanes(sums[0], args.lanes);
            sums[1] = sum_of_lanes(sums[1], args.lanes);
          });
      if (first == 0) origin = __shfl_sync(kAllLanes, found.mean, 0);
      if (!active || in_team != 0) continue;
      if (args.known == Known::chunks) {
        const Affine a = s.store(ghost, c, found.mean, found.square / static_cast<double>(M));
        if (args.affine != nullptr) args.affine[ghost * s.C + c] = packed(a);
      }
      const double nd = static_cast<double>(M) * (found.mean - origin);
      sum += nd;
      square += found.square + nd * (found.mean - origin);
    }
    if (!s.runs()) continue;
    sum = warp_sum(sum);
    square = warp_sum(square);
    if (lane == 0) {
      const double all = static_cast<double>(s.all);
      const double rest = square - sum * sum / all;
      s.update(c, origin + sum / all, rest < 0.0 ? 0.0 : rest);
    }
  }
}

struct ApplyArguments {
  const void* x;
  const float4* affine;  // [ghosts · C]
  Elementwise elementwise;
  ApplyGrid grid;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_apply(const __grid_constant__ ApplyArguments args, const __grid_constant__ Act act) {
  constexpr bool kChannelsLast = kLayout == Layout::channels_last;
  constexpr int kAhead = kLoadsAhead<Act>;
  constexpr bool kTogether = Act::kMaskable && W < 8;  // a byte of the mask is made by several
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const float4* __restrict__ affine = args.affine;

  for (int64_t i = blockIdx.x; i < args.grid.pieces; i += gridDim.x) {
    Piece<kLayout, W> piece(args.grid, args.grid.pieces - 1 - i);
    AffineOf<T> of_channel[kChannelsLast ? W : kAhead];
    const auto affine_at = [&](int64_t column) {
      const float4 a = affine[column];
      return AffineOf<T>({a.x, a.y, a.z});
    };
    if constexpr (kChannelsLast) {
      if (!kTogether && !piece.active) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (piece.active) of_channel[j] = affine_at(piece.first_of_stats + j);
      }
    }
    const auto take = [&](auto ahead, auto full, int first) {
      constexpr int kTaken = decltype(ahead)::value;
      Place places[kTaken];
      int64_t of_stats[kTaken];
#pragma unroll
      for (int u = 0; u < kTaken; ++u) {
        places[u] = piece.place(first + u, of_stats[u]);
        if constexpr (decltype(full)::value) places[u].valid = !kTogether || piece.active;
      }
      normalise<T, W, kTaken>(
          args.elementwise, act, places,
          [&](int u, const Place& place) {
            if constexpr (!kChannelsLast) of_channel[u] = affine_at(of_stats[u]);
            return load_unit<T, W>(x + place.offset);
          },
          [&](int u, int j) { return of_channel[kChannelsLast ? j : u]; });
    };
    take_all<kLayout, kAhead, kAnyActivation<Act>>(piece, take);
  }
}

// The workspace: affine [ghosts · C] float4, moments [C, slots].
size_t workspace_bytes(const Plan& plan) {
  const int64_t moments = plan.slots() > 1 ? plan.C * plan.slots() : 0;
  return static_cast<size_t>(plan.columns()) * sizeof(float4) +
         static_cast<size_t>(moments) * sizeof(Moments);
}

const char* validate(const BatchNormForward& args, const void* workspace) {
  const BatchNormShape& shape = args.shape;
  if (shape.N < 0 || shape.C < 0 || shape.HxW < 0) {
    return message("%s: N, C and HxW must not be negative", kForward);
  }
  if (shape.C >= int64_t{1} << 30) {
    return message("%s: expected C < 2^30, got %lld", kForward, static_cast<long long>(shape.C));
  }
  if (args.x == nullptr || args.y == nullptr || args.stats == nullptr || workspace == nullptr) {
    return message("%s: x, y, stats and workspace must not be null", kForward);
  }
  const bool reads_running = !args.training && !args.have_stats;
  if (reads_running && (args.running_mean == nullptr || args.running_var == nullptr)) {
    return message("%s: eval needs running_mean and running_var", kForward);
  }
  return check_mask(kForward, shape.activation, args.mask);
}

const char* forward(const BatchNormForward& args, void* workspace, int device, void* stream) {
  const BatchNormShape& shape = args.shape;
  const Plan plan = make_plan(shape, walks_mask(args));
  const bool reduces = args.training && !args.have_stats;
  if (reduces) {
    bool done = false;
    const char* error = forward_resident(args, plan, workspace, device, stream, done);
    if (error != nullptr || done) return error;
  }
  auto* affine = static_cast<float4*>(workspace);
  auto* moments = reinterpret_cast<Moments*>(affine + plan.columns());
  const Statistics statistics = statistics_of(args, plan);

  const auto with_types = [&](auto type, auto layout, auto width) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    int64_t blocks = 0;

    if (reduces) {
      const PartialArguments partials{args.x, plan.slots() > 1 ? moments : nullptr, affine,
                                      ChunkGrid(plan, W), statistics};
      if (const char* error = grid_size(kForward, device, partials.grid.pieces, blocks)) {
        return error;
      }
      if (const char* error = launch("batch_norm_partials", batch_norm_partials<T, kLayout, W>,
                                     blocks, kThreads, 0, stream, partials)) {
        return error;
      }
    }
    if (!reduces || plan.slots() > 1) {
      const Known known = args.have_stats ? Known::stats
                          : args.training ? Known::chunks
                                          : Known::running;
      const int lanes = known == Known::chunks ? finish_lanes(plan) : 1;
      const FinishArguments finish{known, moments, plan.chunks, plan.slots(),
                                   lanes, affine,  statistics};
      if (const char* error = forward_finish(finish, device, stream)) return error;
    }
    const float slope = static_cast<float>(shape.slope);
    return with_activation<Identity, Relu>(shape.activation, slope, [&](auto act) -> const char* {
      const auto kernel = batch_norm_apply<T, kLayout, W, decltype(act)>;
      int64_t resident = 0;
      if (const char* error =
              resident_blocks("batch_norm_apply", kernel, kApplyShape, device, &resident))
        return error;
      const ApplyArguments apply{args.x, affine, Elementwise(args, plan),
                                 ApplyGrid(plan, W, args.mask != nullptr, resident)};
      if (const char* error = grid_size(kForward, device, apply.grid.pieces, blocks)) {
        return error;
      }
      return launch("batch_norm_apply", kernel, blocks, kThreads, 0, stream, apply, act);
    });
  };

  return dispatch_dtype(kForward, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_layout(plan.layout, [&](auto layout) {
      return dispatch_width<T>(plan.row(), {args.x, args.residual, args.y},
                               [&](auto width) { return with_types(type, layout, width); });
    });
  });
}

}  // namespace batch_norm_forward_cu

const char* forward_finish(const FinishArguments& args, int device, void* stream) {
  const int64_t at_once = args.lanes == kThreads ? 1 : kThreads / kWarp;
  const int64_t pieces = ceil_divide(args.statistics.C, at_once);
  int64_t blocks = 0;
  if (const char* error = grid_size(kForward, device, pieces, blocks)) return error;
  return launch("batch_norm_finish", batch_norm_finish, blocks, kThreads, 0, stream, args);
}

}  // namespace batchops::cuda

namespace batchops {

size_t batch_norm_forward_workspace_cuda(const BatchNormForward& args, int device) {
  if (args.shape.numel() == 0) return 0;
  cuda::Device found;
  if (cuda::query(cuda::kForward, device, found) != nullptr) return 0;
  const bool mask = cuda::walks_mask(args);
  const cuda::Plan plan = cuda::make_plan(args.shape, mask);
  return std::max(cuda::workspace_bytes(plan),
                  cuda::forward_resident_workspace(plan, args.shape, mask, found));
}

const char* batch_norm_forward_cuda(const BatchNormForward& args, void* workspace, int device,
                                    void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  if (const char* error = cuda::use_device(cuda::kForward, device)) return error;
  if (const char* error = cuda::validate(args, workspace)) return error;
  return cuda::forward(args, workspace, device, stream);
}

}  // namespace batchops
