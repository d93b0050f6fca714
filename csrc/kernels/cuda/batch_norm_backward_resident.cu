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
  using Table = std::conditional_t<kCrowded, AffineTable, int>;
  BATCHOPS_SHARED(table, Table);
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
          table.set(r, g.affine(ghost, chunk.first_channel() + r));
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
      sums_of<T, kAhead, true>(
          chunk, tensors, act, affines_of<W>(table, affine, chunk),
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

// channels_first: a set is a ghost batch's channel, or as many as have their planes taken together.
template <class T, int W, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, blocks_where_flowing<Act>(kPlanes, W == 8))
    batch_norm_backward_flow(const __grid_constant__ ResidentArguments args,
                             const __grid_constant__ Act act) {
  using MyChunk = std::conditional_t<kPlanes, PlanesChunk<W>, Chunk<Layout::channels_first, W>>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kAhead = kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  const Tensors& tensors = args.tensors;
  const T* __restrict__ dy = static_cast<const T*>(tensors.dy);
  const T* __restrict__ x = static_cast<const T*>(tensors.x);
  const T* __restrict__ residual = static_cast<const T*>(tensors.residual);
  const bool adds = kMayAdd<Act> && residual != nullptr;
  const Team& team = args.team;
  const Gradients& g = args.gradients;
  const Passing<float2, Direction> passing{team};
  const int rank = static_cast<int>(blockIdx.x % team.parts);
  const int64_t teams = gridDim.x / team.parts;
  const auto piece_of = [&](int64_t set, int64_t& ghost) {
    ghost = set / args.grid.across;
    return (ghost * team.parts + rank) * args.grid.across + (set - ghost * args.grid.across);
  };
  // The set whose sums are next, and the one before, whose sums have been left.
  int64_t set = blockIdx.x / team.parts;
  int64_t before = -1;
  Kept<T, W> kept{bytes, team.kept};
  Kept<T, W> other{
      bytes + (adds ? 3 : 2) * team.kept * kThreads * static_cast<int>(sizeof(Unit<T, W>)),
      team.kept};

  for (;; before = set, set += teams) {
    if (set < team.sets) {
      int64_t ghost;
      const MyChunk chunk(args.grid, piece_of(set, ghost));
      Affine affine[kPlanes ? 2 : 1];
      affine[0] = g.affine(ghost, chunk.first_channel() + chunk.local(0));
      if constexpr (kPlanes) {
        affine[1] = g.affine(ghost, chunk.first_channel() + chunk.local(W - 1));
      }
      float sums[2][kChannels];
      sums_of<T, kAhead, true>(
          chunk, tensors, act,
          [&](int first) {
            return [&, first](int j) {
              if constexpr (kPlanes) return first + j < chunk.split ? affine[0] : affine[1];
              return affine[0];
            };
          },
          [&](int i, const Loaded<T, W>& loaded) {
            if (!kept.has(i)) return;
            kept.at(0, i) = loaded.dy;
            kept.at(1, i) = loaded.x;
            if (adds) kept.at(2, i) = loaded.residual;
          },
          scratch, sums);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.writes(j)) {
          passing.sums(set, rank, chunk.local(j)) = make_float2(sums[0][j], sums[1][j]);
        }
      }
      if (passing.arrive(set)) {
        int channel = 0;
        int thread = static_cast<int>(threadIdx.x);
        int threads = kThreads;
        if constexpr (kPlanes) {  // a warp each
          channel = thread / kWarp;
          thread %= kWarp;
          threads = kWarp;
        }
        const bool writes = thread == 0 && channel < chunk.channels();
        double all[2] = {};
        for (int k = thread; k < team.parts && channel < chunk.channels(); k += threads) {
          const float2 part = passing.sums(set, k, channel);
          all[0] += part.x;
          all[1] += part.y;
        }
        if constexpr (kPlanes) {
          all[0] = warp_sum(all[0]);
          all[1] = warp_sum(all[1]);
        } else {
          block_sum<kThreads>(all);
        }
        if (writes) {
          const int64_t c = chunk.first_channel() + channel;
          const ColumnSums of_column = g.sums(ghost, c, all[0], all[1]);
          passing.result(set, channel) = g.direction(ghost, c, of_column);
          if (args.columns == nullptr) {
            g.store(c, of_column);
          } else {
            args.columns[c * g.ghosts + ghost] =
                make_float2(static_cast<float>(all[0]), static_cast<float>(all[1]));
          }
        }
        passing.tell(set);
      }
    }
    if (before >= 0) {
      int64_t ghost;
      const MyChunk chunk(args.grid, piece_of(before, ghost));
      passing.wait(before);
      Direction direction[kPlanes ? 2 : 1];
      direction[0] = passing.result(before, chunk.local(0));
      if constexpr (kPlanes) direction[1] = passing.result(before, chunk.local(W - 1));
      for (int batch = chunk.batches() - 1; batch >= 0; --batch) {
#pragma unroll 1
        for (int part = 0; part < kInFlight; part += kAhead) {
          Place places[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
          propagate<T, W, kAhead>(
              tensors, act, places,
              [&](int u, const Place& place, Loaded<T, W>& to) {
                const int i = batch * kInFlight + part + u;
                if (other.has(i)) {
                  to.dy = other.at(0, i);
                  to.x = other.at(1, i);
                  if (adds) to.residual = other.at(2, i);
                } else {
                  to.dy = load_unit<T, W>(dy + place.offset);
                  to.x = load_unit<T, W>(x + place.offset);
                  if (adds) to.residual = load_unit<T, W>(residual + place.offset);
                }
              },
              [&](int, int j) {
                if constexpr (kPlanes) return j < chunk.split ? direction[0] : direction[1];
                return direction[0];
              },
              [&](const Place& place) {
                return bits_of(chunk, tensors.mask, tensors.mask_row, place);
              });
        }
      }
    }
    if (set >= team.sets) break;
    const Kept<T, W> next = other;
    other = kept;
    kept = next;
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
  return team_bytes(plan, keeping, device) + columns_bytes(plan);
}

const char* backward_resident(const BatchNormBackward& args, const Plan& plan, void* workspace,
                              int device, void* stream, bool& done) {
  const BatchNormShape& shape = args.shape;
  Device on;
  if (const char* error = query(kBackward, device, on)) return error;
  const Tensors tensors(args, plan);
  const Keeping keeping = keeping_of(shape, tensors.residual != nullptr);
  const std::initializer_list<const void*> pointers = {args.dy, args.x, tensors.residual, args.dx,
                                                       args.dresidual};
  const Residency found = residency_for(plan, keeping, on, pointers);
  if (!found.possible) return nullptr;
  const TeamPlaces places(found, keeping);
  auto* columns =
      plan.ghosts == 1
          ? nullptr
          : reinterpret_cast<float2*>(static_cast<unsigned char*>(workspace) + places.bytes());
  const Gradients gradients = gradients_of(args, plan);

  const auto run_planes = [&](auto type, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const ResidentArguments to{tensors, columns, residency::grid(plan, keeping, found, W),
                               make_team<T, W>(plan, keeping, found, places, workspace), gradients};
    return launch_team(kBackward, "batch_norm_backward_flow",
                       batch_norm_backward_flow<T, W, true, decltype(act)>, found, to, act, device,
                       stream, done);
  };
  const auto run = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    const ResidentArguments to{tensors, columns, residency::grid(plan, keeping, found, W),
                               make_team<T, W>(plan, keeping, found, places, workspace), gradients};
    if constexpr (kLayout == Layout::channels_first) {
      if (found.flow) {
        return launch_team(kBackward, "batch_norm_backward_flow",
                           batch_norm_backward_flow<T, W, false, decltype(act)>, found, to, act,
                           device, stream, done);
      }
    }
    return launch_team(kBackward, "batch_norm_backward_resident",
                       batch_norm_backward_resident<T, kLayout, W, decltype(act)>, found, to, act,
                       device, stream, done);
  };
  const bool any = tensors.residual != nullptr;
  const char* error = found.planes ? dispatch_planes(kBackward, shape, run_planes, any)
                                   : dispatch_resident(kBackward, shape, plan, pointers, run, any);
  const bool wants_parameters = args.dweight != nullptr || args.dbias != nullptr;
  if (error != nullptr || !done || columns == nullptr || !wants_parameters) return error;
  const GradientFinishArguments finish{columns, 1,       plan.ghosts, true,
                                       1,       nullptr, nullptr,     gradients};
  return backward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
