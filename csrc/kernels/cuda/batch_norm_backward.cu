// Batch norm backward (batch_norm_backward.cuh):
//
//   partials:  Σ dz and Σ dz · (x - mean) of each chunk               reads dy, x (and the mask)
//   finish:    dbias, dweight and what dx takes of them
//   apply:     dx, dresidual                                         reads dy, x, writes both
//
// batch_norm_backward_resident.cu reads dy and x once where they fit on the chip.
#include <algorithm>

#include "kernels/cuda/batch_norm_backward.cuh"

namespace batchops::cuda {
inline namespace batch_norm_backward_cu {

BATCHOPS_DEVICE void store_direction(const Direction& d, float4* direction, float* shift,
                                     int64_t column) {
  direction[column] = make_float4(d.mean, d.scale, d.along, d.constant);
  shift[column] = d.shift;
}

struct PartialArguments {
  Tensors tensors;
  float2* sums;       // [C, slots]: Σ dz, Σ dz · (x - mean); or null: the only ones
  float4* direction;  // then [C]
  float* shift;
  ChunkGrid grid;
  Gradients gradients;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_partials(const __grid_constant__ PartialArguments args,
                                 const __grid_constant__ Act act) {
  using MyChunk = Chunk<kLayout, W>;
  constexpr int kChannels = MyChunk::kChannels;
  // Many channels a thread leave few registers: coefficients are read again for each unit.
  constexpr bool kCrowded = kChannels == 8;
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  using Table = std::conditional_t<kCrowded, AffineTable<T, kTileChannels>, int>;
  BATCHOPS_SHARED(table, Table);
  BATCHOPS_SHARED(of_channel, float2[MyChunk::kMostChannels]);
  const Gradients& gradients = args.gradients;
  const Fetch<T, W, kMayAdd<Act>> fetch(args.tensors);

  for (int64_t piece = blockIdx.x; piece < args.grid.pieces; piece += gridDim.x) {
    const MyChunk chunk(args.grid, piece);
    AffineOf<T> affine[kCrowded ? 1 : kChannels] = {};
    if constexpr (kCrowded) {
      const int channels = chunk.channels();
      for (int r = threadIdx.x; r < channels; r += kThreads) {
        table.set(r, AffineOf<T>(gradients.affine(chunk.at.ghost, chunk.first_channel() + r)));
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.has_channel(j)) {
          affine[j] =
              AffineOf<T>(gradients.affine(chunk.at.ghost, chunk.first_channel() + chunk.local(j)));
        }
      }
    }
    float sums[2][kChannels];
    sums_of<T, kLoadsAhead<Act, kCrowded>, false>(
        chunk, args.tensors, act, affines_of<W>(table, affine, chunk), [](int) {},
        [&](int, const auto& place, Loaded<T, W>& to) { fetch(place(), to); }, scratch, sums);

    if (chunk.writes_any()) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        of_channel[chunk.local(j)] = make_float2(sums[0][j], sums[1][j]);
      }
    }
    __syncthreads();
    const int channels = chunk.channels();
    for (int r = threadIdx.x; r < channels; r += kThreads) {
      const int64_t c = chunk.first_channel() + r;
      const float2 found = of_channel[r];
      if (args.sums != nullptr) {
        args.sums[c * args.grid.slots + chunk.at.slot] = found;
        continue;
      }
      const Column column = gradients.column(0, c);
      const ColumnSums of_column = gradients.sums(column, found.x, found.y);
      gradients.store(c, of_column);
      store_direction(gradients.direction(column, 0, of_column), args.direction, args.shift, c);
    }
  }
}

// A block a channel, or a warp, `lanes` of its lanes a ghost batch; each adds every lanes-th chunk
// in turn.
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_finish(const __grid_constant__ GradientFinishArguments args) {
  constexpr int kAhead = 4;
  const Gradients& g = args.gradients;
  const auto sum_of = [&](const float2* __restrict__ sums, int64_t count, int thread,
                          double (&to)[2]) {
    for (int64_t k = thread; k < count; k += int64_t{kAhead} * args.lanes) {
      float2 parts[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t at = k + int64_t{u} * args.lanes;
        parts[u] = at < count ? sums[at] : make_float2(0.0f, 0.0f);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        to[0] += parts[u].x;
        to[1] += parts[u].y;
      }
    }
  };
  if (args.lanes == kThreads) {
    for (int64_t c = blockIdx.x; c < g.C; c += gridDim.x) {
      const Column column = g.column(0, c);
      double sums[2] = {};
      sum_of(args.sums + c * args.slots, args.slots, static_cast<int>(threadIdx.x), sums);
      block_sum<kThreads>(sums);
      const ColumnSums of_column = g.sums(column, sums[0], sums[1]);
      if (threadIdx.x == 0 && args.direction != nullptr) {
        store_direction(g.direction(column, 0, of_column), args.direction, args.shift, c);
      } else if (threadIdx.x == kWarp) {
        g.store(c, of_column);
      }
    }
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const int in_team = lane % args.lanes;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t c = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; c < g.C;
       c += warps) {
    ColumnSums all{0.0, 0.0};
    for (int64_t first = 0; first < g.ghosts; first += kWarp / args.lanes) {
      const int64_t ghost = first + lane / args.lanes;
      const bool active = ghost < g.ghosts;
      double sums[2] = {};
      if (active && args.sums_known) {
        const int64_t slot = ghost * args.chunks;
        const int64_t chunks = ghost + 1 < g.ghosts ? args.chunks : args.slots - slot;
        sum_of(args.sums + c * args.slots + slot, chunks, in_team, sums);
      }
      sums[0] = sum_of_lanes(sums[0], args.lanes);
      sums[1] = sum_of_lanes(sums[1], args.lanes);
      if (!active || in_team != 0) continue;
      const Column column = g.column(ghost, c);
      const ColumnSums of_column = g.sums(column, sums[0], sums[1]);
      if (args.direction != nullptr) {
        store_direction(g.direction(column, ghost, of_column), args.direction, args.shift,
                        ghost * g.C + c);
      }
      all.bias += of_column.bias;
      all.weight += of_column.weight;
    }
    all.bias = warp_sum(all.bias);
    all.weight = warp_sum(all.weight);
    if (lane == 0 && args.sums_known) g.store(c, all);
  }
}

struct ApplyArguments {
  Tensors tensors;
  const float4* direction;
  const float* shift;
  bool reads_x;  // dx depends on x, or z is recomputed
  ApplyGrid grid;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_apply(const __grid_constant__ ApplyArguments args,
                              const __grid_constant__ Act act) {
  constexpr bool kChannelsLast = kLayout == Layout::channels_last;
  constexpr int kAhead = kLoadsAhead<Act, (kChannelsLast && W == 8)>;
  const Tensors& tensors = args.tensors;
  const T* __restrict__ dy = static_cast<const T*>(tensors.dy);
  const T* __restrict__ x = static_cast<const T*>(tensors.x);
  const T* __restrict__ residual = static_cast<const T*>(tensors.residual);
  const float4* __restrict__ direction = args.direction;
  const float* __restrict__ shift = args.shift;
  const bool recompute = Act::kNeedsZ && tensors.mask == nullptr;
  const bool adds = kMayAdd<Act> && residual != nullptr;

  for (int64_t i = blockIdx.x; i < args.grid.pieces; i += gridDim.x) {
    Piece<kLayout, W> piece(args.grid, args.grid.pieces - 1 - i);
    constexpr int kSets = kChannelsLast ? W : kAhead;
    DirectionOf<T> of_channel[kSets];
    const auto direction_at = [&](int64_t column) {
      const float4 d = direction[column];
      return DirectionOf<T>({d.x, d.y, d.z, d.w, recompute ? shift[column] : 0.0f});
    };
    if constexpr (kChannelsLast) {
      if (!piece.active) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) of_channel[j] = direction_at(piece.first_of_stats + j);
    }
    const auto take = [&](auto ahead, auto full, int first) {
      constexpr int kTaken = decltype(ahead)::value;
      Place places[kTaken];
      int64_t of_stats[kTaken];
#pragma unroll
      for (int u = 0; u < kTaken; ++u) {
        places[u] = piece.place(first + u, of_stats[u]);
        if constexpr (decltype(full)::value) places[u].valid = true;
      }
      propagate<T, W, kTaken, W>(
          tensors, act, places,
          [&](int u, const Place& place, Loaded<T, W>& to) {
            to.x = zero_unit<T, W>();
            to.dy = load_unit<T, W>(dy + place.offset);
            if (args.reads_x) to.x = load_unit<T, W>(x + place.offset);
            if (adds) to.residual = load_unit<T, W>(residual + place.offset);
            if constexpr (!kChannelsLast) of_channel[u] = direction_at(of_stats[u]);
          },
          [&](int u, int) { return [&, u](int j) { return of_channel[kChannelsLast ? j : u]; }; });
    };
    take_all<kLayout, kAhead, kAnyActivation<Act>>(piece, take);
  }
}

// The workspace: direction [ghosts · C] float4, sums [C, slots] float2, shift [ghosts · C] float.
int64_t sums_count(const Plan& plan) { return plan.slots() > 1 ? plan.C * plan.slots() : 0; }
size_t workspace_bytes(const Plan& plan) {
  return static_cast<size_t>(plan.columns()) * (sizeof(float4) + sizeof(float)) +
         static_cast<size_t>(sums_count(plan)) * sizeof(float2);
}

const char* validate(const BatchNormBackward& args, const void* workspace) {
  const BatchNormShape& shape = args.shape;
  if (shape.N < 0 || shape.C < 0 || shape.HxW < 0) {
    return message("%s: N, C and HxW must not be negative", kBackward);
  }
  if (shape.C >= int64_t{1} << 30) {
    return message("%s: expected C < 2^30, got %lld", kBackward, static_cast<long long>(shape.C));
  }
  if (args.dy == nullptr || args.x == nullptr || args.stats == nullptr || workspace == nullptr) {
    return message("%s: dy, x, stats and workspace must not be null", kBackward);
  }
  return check_mask(kBackward, shape.activation, args.mask);
}

const char* backward(const BatchNormBackward& args, void* workspace, int device, void* stream) {
  const BatchNormShape& shape = args.shape;
  const bool wants_sums =
      args.dweight != nullptr || args.dbias != nullptr || (args.training && args.dx != nullptr);
  const bool wants_elements = args.dx != nullptr || args.dresidual != nullptr;
  if (!wants_sums && !wants_elements) return nullptr;
  const Plan plan = make_plan(shape, args.mask != nullptr);
  // Without elements too: so the sums have the same bits, whatever else is wanted.
  if (wants_sums) {
    bool done = false;
    const char* error = backward_resident(args, plan, workspace, device, stream, done);
    if (error != nullptr || done) return error;
  }

  const Tensors tensors(args, plan);
  auto* direction = static_cast<float4*>(workspace);
  auto* sums = reinterpret_cast<float2*>(direction + plan.columns());
  auto* shift = reinterpret_cast<float*>(sums + sums_count(plan));
  const Gradients gradients = gradients_of(args, plan);

  const auto with_types = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    using Act = decltype(act);
    int64_t blocks = 0;

    if (wants_sums) {
      const PartialArguments partials{
          tensors,  plan.slots() > 1 ? sums : nullptr, direction, shift, ChunkGrid(plan, W),
          gradients};
      if (const char* error = grid_size(kBackward, device, partials.grid.pieces, blocks)) {
        return error;
      }
      if (const char* error = launch("batch_norm_backward_partials",
                                     batch_norm_backward_partials<T, kLayout, W, Act>, blocks,
                                     kThreads, 0, stream, partials, act)) {
        return error;
      }
    }
    if (!wants_sums || plan.slots() > 1) {
      const int lanes = wants_sums ? finish_lanes(plan) : 1;
      const GradientFinishArguments finish{sums,  plan.chunks, plan.slots(), wants_sums,
                                           lanes, direction,   shift,        gradients};
      if (const char* error = backward_finish(finish, device, stream)) return error;
    }
    if (!wants_elements) return nullptr;
    const auto kernel = batch_norm_backward_apply<T, kLayout, W, Act>;
    int64_t resident = 0;
    if (const char* error =
            resident_blocks("batch_norm_backward_apply", kernel, kApplyShape, device, &resident)) {
      return error;
    }
    const ApplyArguments apply{tensors, direction, shift, tensors.along_x || recomputes(args),
                               ApplyGrid(plan, W, false, resident)};
    if (const char* error = grid_size(kBackward, device, apply.grid.pieces, blocks)) return error;
    return launch("batch_norm_backward_apply", kernel, blocks, kThreads, 0, stream, apply, act);
  };

  return dispatch_dtype(kBackward, shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_layout(plan.layout, [&](auto layout) {
      return dispatch_width<T>(
          plan.row(), {args.dy, args.x, tensors.residual, args.dx, args.dresidual},
          [&](auto width) {
            return dispatch_activation<T, decltype(width)::value>(
                shape, tensors.residual != nullptr,
                [&](auto act) { return with_types(type, layout, width, act); });
          });
    });
  });
}

}  // namespace batch_norm_backward_cu

const char* backward_finish(const GradientFinishArguments& args, int device, void* stream) {
  const int64_t at_once = args.lanes == kThreads ? 1 : kThreads / kWarp;
  const int64_t pieces = ceil_divide(args.gradients.C, at_once);
  int64_t blocks = 0;
  if (const char* error = grid_size(kBackward, device, pieces, blocks)) return error;
  return launch("batch_norm_backward_finish", batch_norm_backward_finish, blocks, kThreads, 0,
                stream, args);
}

}  // namespace batchops::cuda

namespace batchops {

size_t batch_norm_backward_workspace_cuda(const BatchNormBackward& args, int device) {
  if (args.shape.numel() == 0) return 0;
  cuda::Device found;
  if (cuda::query(cuda::kBackward, device, found) != nullptr) return 0;
  const cuda::Plan plan = cuda::make_plan(args.shape, args.mask != nullptr);
  const bool residual = cuda::recomputes(args) && args.residual != nullptr;
  return std::max(cuda::workspace_bytes(plan),
                  cuda::backward_resident_workspace(plan, args.shape, residual, found));
}

const char* batch_norm_backward_cuda(const BatchNormBackward& args, void* workspace, int device,
                                     void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  if (const char* error = cuda::use_device(cuda::kBackward, device)) return error;
  if (const char* error = cuda::validate(args, workspace)) return error;
  return cuda::backward(args, workspace, device, stream);
}

}  // namespace batchops
