// Batch norm backward with dy and x kept on the chip between the sums and dx: one read of each, one
// write of dx (+ 1 of dresidual, + 1 read of the residual where z is made from it, + 2 of the
// mask).
#include "kernels/cuda/batch_norm_backward.cuh"
#include "kernels/cuda/batch_norm_residency.cuh"

namespace batchops::cuda {
inline namespace batch_norm_backward_resident_cu {

struct ResidentArguments {
  Tensors tensors;
  float2* columns;  // [C, ghosts]: their sums; null with one ghost batch
  ChunkGrid grid;
  Team team;
  Gradients gradients;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_resident(const __grid_constant__ ResidentArguments args,
                                 const __grid_constant__ Act act) {
  using MyChunk = Chunk<kLayout, W>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kTile = kLayout == Layout::channels_first ? 1 : kMostResidentTile;
  // Large units leave few registers, so that fewer are loaded ahead, and many channels a thread
  // even less: there coefficients are read from shared memory again for each unit.
  constexpr bool kCrowded = kChannels == 8;
  constexpr int kAhead = W < 8 ? kLoadsAhead<Act> : kCrowded && kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(own_sums, float2[kTile]);
  BATCHOPS_SHARED(directions, Direction[kTile]);
  const Tensors& tensors = args.tensors;
  const T* __restrict__ dy = static_cast<const T*>(tensors.dy);
  const T* __restrict__ x = static_cast<const T*>(tensors.x);
  const T* __restrict__ residual = static_cast<const T*>(tensors.residual);
  const bool adds = kMayAdd<Act> && residual != nullptr;
  const Team& team = args.team;
  const Gradients& g = args.gradients;
  const Kept<T, W> kept{bytes, team.kept};
  const int rank = static_cast<int>(blockIdx.x % team.parts);

  for (int64_t set = blockIdx.x / team.parts; set < team.sets; set += gridDim.x / team.parts) {
    const int64_t ghost = set / args.grid.across;
    const int64_t across = set - ghost * args.grid.across;
    const int64_t piece = (ghost * team.parts + rank) * args.grid.across + across;
    const Meeting<float2> meeting{team, set, rank, own_sums};
    {
      const MyChunk chunk(args.grid, forgotten(piece));
      const int channels = chunk.channels();
      Affine affine[kCrowded ? 1 : kChannels] = {};
      if constexpr (kCrowded) {
        for (int r = threadIdx.x; r < channels; r += kThreads) {
          const Affine a = g.affine(ghost, chunk.first_channel() + r);
          directions[r] = {a.mean, a.scale, 0.0f, 0.0f, a.shift};
        }
        __syncthreads();
      } else {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          if (chunk.has_channel(j)) {
            affine[j] = g.affine(ghost, chunk.first_channel() + chunk.local(j));
          }
        }
      }
      float sums[2][kChannels];
      sums_of<T, kLayout, W, kAhead, true>(
          chunk, tensors, act,
          [&] {
            const int first = kCrowded ? forgotten(chunk.local(0)) : 0;
            return [&, first](int j) {
              return kCrowded ? directions[first + j].affine() : affine[kCrowded ? 0 : j];
            };
          },
          [&](int i, const Loaded<T, W>& loaded) {
            if (!kept.has(i)) return;
            kept.at(0, i) = loaded.dy;
            kept.at(1, i) = loaded.x;
            if (adds) kept.at(2, i) = loaded.residual;
          },
          scratch, sums);
      if (chunk.writes()) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          meeting.place()[chunk.local(j)] = make_float2(sums[0][j], sums[1][j]);
        }
      }
    }
    meeting.meet();
    const MyChunk chunk(args.grid, forgotten(piece));
    const int channels = chunk.channels();
    meeting.for_channels(channels, [&](int r, int lane, int lanes) {
      const int channel = r < channels ? r : 0;
      double sum = 0.0;
      double product = 0.0;
      for (int k = lane; k < team.parts; k += lanes) {
        const float2 s = meeting.of(k, channel);
        sum += s.x;
        product += s.y;
      }
      sum = sum_of_lanes(sum, lanes);
      product = sum_of_lanes(product, lanes);
      if (r >= channels || lane != 0) return;
      const int64_t c = chunk.first_channel() + r;
      const ColumnSums of_column = g.sums(ghost, c, sum, product);
      directions[r] = g.direction(ghost, c, of_column);
      if (rank != 0) return;
      if (args.columns == nullptr) {
        g.store(c, of_column);
      } else {
        args.columns[c * g.ghosts + ghost] =
            make_float2(static_cast<float>(sum), static_cast<float>(product));
      }
    });
    __syncthreads();

    Direction direction[kCrowded ? 1 : kChannels] = {};
    if constexpr (!kCrowded) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.has_channel(j)) direction[j] = directions[chunk.local(j)];
      }
    }
    for (int batch = chunk.batches() - 1; batch >= 0; --batch) {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Place places[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
        const int first = chunk.local(0);
        propagate<T, W, kAhead>(
            tensors, act, places,
            [&](int u, const Place& place, Loaded<T, W>& to) {
              const int i = batch * kInFlight + part + u;
              if (kept.has(i)) {
                to.dy = kept.at(0, i);
                to.x = kept.at(1, i);
                if (adds) to.residual = kept.at(2, i);
              } else {
                to.dy = load_unit<T, W>(dy + place.offset);
                to.x = load_unit<T, W>(x + place.offset);
                if (adds) to.residual = load_unit<T, W>(residual + place.offset);
              }
            },
            [&](int, int j) {
              return kCrowded ? directions[forgotten(first) + j] : direction[j % kChannels];
            });
      }
    }
    meeting.part();
  }
}

Keeping keeping_of(const BatchNormShape& shape, bool residual) {
  // Without a mask to write, rows need no padding.
  return {residual ? 3 : 2, static_cast<int>(size_of(shape.dtype)), sizeof(float2), false};
}

// The workspace: the team's, then sums of columns [C, ghosts].
size_t columns_bytes(const Plan& plan) {
  return plan.ghosts > 1 ? static_cast<size_t>(plan.columns()) * sizeof(float2) : 0;
}

}  // namespace batch_norm_backward_resident_cu

size_t backward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool residual,
                                   const Device& device) {
  const Keeping keeping = keeping_of(shape, residual);
  const Residency found = make_residency(plan, keeping, device);
  if (!found.possible) return 0;
  return TeamPlaces(found, keeping).bytes() + columns_bytes(plan);
}

const char* backward_resident(const BatchNormBackward& args, const Plan& plan, void* workspace,
                              int device, void* stream, bool& done) {
  const BatchNormShape& shape = args.shape;
  Device on;
  if (const char* error = query(kBackward, device, on)) return error;
  const Tensors tensors(args, plan);
  const Keeping keeping = keeping_of(shape, tensors.residual != nullptr);
  const Residency found = make_residency(plan, keeping, on);
  if (!found.possible) return nullptr;
  const TeamPlaces places(found, keeping);
  auto* columns =
      plan.ghosts == 1
          ? nullptr
          : reinterpret_cast<float2*>(static_cast<unsigned char*>(workspace) + places.bytes());
  const Gradients gradients = gradients_of(args, plan);

  const auto run = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    const ResidentArguments to{tensors, columns, residency::grid(plan, keeping, found, W),
                               make_team<T, W>(plan, keeping, found, places, workspace), gradients};
    return launch_team(kBackward, "batch_norm_backward_resident",
                       batch_norm_backward_resident<T, kLayout, W, decltype(act)>, found, to, act,
                       device, stream, done);
  };
  const char* error = dispatch_resident(
      kBackward, shape, plan, {args.dy, args.x, tensors.residual, args.dx, args.dresidual}, run,
      tensors.residual != nullptr);
  const bool wants_parameters = args.dweight != nullptr || args.dbias != nullptr;
  if (error != nullptr || !done || columns == nullptr || !wants_parameters) return error;
  const GradientFinishArguments finish{columns, 1,       plan.ghosts, true,
                                       1,       nullptr, nullptr,     gradients};
  return backward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
