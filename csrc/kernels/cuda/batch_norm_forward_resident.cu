// Batch norm forward with x kept on the chip between the statistics and the normalisation: one read
// of x, one write of y (+ 1 read of the residual, + the mask).
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/batch_norm_forward.cuh"
#include "kernels/cuda/batch_norm_residency.cuh"

namespace batchops::cuda {
inline namespace batch_norm_forward_resident_cu {

struct ResidentArguments {
  const void* x;
  Moments* columns;  // [C, ghosts]; null with one ghost batch
  Elementwise elementwise;
  ChunkGrid grid;
  Team team;
  Statistics statistics;
};

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_forward_resident(const __grid_constant__ ResidentArguments args,
                                const __grid_constant__ Act act) {
  using MyChunk = Chunk<kLayout, W>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kTile = kLayout == Layout::channels_first ? 1 : kMostResidentTile;
  constexpr int kAhead = kLoadsAhead<Act>;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(moments, Moments[kTile]);
  BATCHOPS_SHARED(affines, Affine[kTile]);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const Team& team = args.team;
  const Statistics& s = args.statistics;
  const Kept<T, W> kept{bytes, team.kept};
  const int rank = static_cast<int>(blockIdx.x % team.parts);

  for (int64_t set = blockIdx.x / team.parts; set < team.sets; set += gridDim.x / team.parts) {
    const int64_t ghost = set / args.grid.across;
    const int64_t across = set - ghost * args.grid.across;
    const int64_t piece = (ghost * team.parts + rank) * args.grid.across + across;
    const Meeting<Moments> meeting{team, set, rank, moments};
    {
      const MyChunk chunk(args.grid, forgotten(piece));
      Moments found[kChannels];
      moments_of<T, kLayout, W, true>(
          chunk, x,
          [&](int i, const Unit<T, W>& unit) {
            if (kept.has(i)) kept.at(0, i) = unit;
          },
          scratch, found);
      if (chunk.writes()) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) meeting.place()[chunk.local(j)] = found[j];
      }
    }
    meeting.meet();
    const MyChunk chunk(args.grid, forgotten(piece));
    const int channels = chunk.channels();
    meeting.for_channels(channels, [&](int r, int lane, int lanes) {
      const int channel = r < channels ? r : 0;
      const int64_t c = chunk.first_channel() + channel;
      const int64_t M = s.count(ghost);
      const MeanAndVariance found = merge(
          M, team.parts, lane, lanes,
          [&](int64_t k) { return meeting.of(static_cast<int>(k), channel); },
          [lanes](double value) { return sum_of_lanes(value, lanes); });
      if (r >= channels || lane != 0) return;
      affines[r] = s.store(ghost, c, found.mean, found.square / static_cast<double>(M), rank == 0);
      if (rank != 0) return;
      if (args.columns == nullptr) {
        s.update(c, found.mean, found.square);
      } else {
        const float high = static_cast<float>(found.mean);
        const double low = (found.mean - high) * static_cast<double>(M);
        args.columns[c * s.ghosts + ghost] = {
            high, static_cast<float>(low), static_cast<float>(found.square), static_cast<float>(M)};
      }
    });
    __syncthreads();

    Affine affine[kChannels] = {};
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (chunk.has_channel(j)) affine[j] = affines[chunk.local(j)];
    }
    for (int batch = chunk.batches() - 1; batch >= 0; --batch) {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Place places[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
        normalise<T, W, kAhead>(
            args.elementwise, act, places,
            [&](int u, const Place& place) {
              const int i = batch * kInFlight + part + u;
              return kept.has(i) ? kept.at(0, i) : load_unit<T, W>(x + place.offset);
            },
            [&](int, int j) { return affine[j % kChannels]; });
      }
    }
    meeting.part();
  }
}

Keeping keeping_of(const BatchNormShape& shape, bool mask) {
  return {1, static_cast<int>(size_of(shape.dtype)), sizeof(Moments), mask};
}

// The workspace: the team's, then moments of columns [C, ghosts].
size_t columns_bytes(const Plan& plan) {
  return plan.ghosts > 1 ? static_cast<size_t>(plan.columns()) * sizeof(Moments) : 0;
}

}  // namespace batch_norm_forward_resident_cu

bool keep_on_chip = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_RESIDENT");
  return said == nullptr || std::strcmp(said, "0") != 0;
}();

int spared_multiprocessors = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_SM_MARGIN");
  return said == nullptr ? 0 : std::max(0, std::atoi(said));
}();

size_t forward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool mask,
                                  const Device& device) {
  const Keeping keeping = keeping_of(shape, mask);
  const Residency found = make_residency(plan, keeping, device);
  if (!found.possible) return 0;
  return TeamPlaces(found, keeping).bytes() + columns_bytes(plan);
}

const char* forward_resident(const BatchNormForward& args, const Plan& plan, void* workspace,
                             int device, void* stream, bool& done) {
  const BatchNormShape& shape = args.shape;
  Device on;
  if (const char* error = query(kForward, device, on)) return error;
  const Keeping keeping = keeping_of(shape, walks_mask(args));
  const Residency found = make_residency(plan, keeping, on);
  if (!found.possible) return nullptr;
  const TeamPlaces places(found, keeping);
  auto* columns =
      plan.ghosts == 1
          ? nullptr
          : reinterpret_cast<Moments*>(static_cast<unsigned char*>(workspace) + places.bytes());
  const Statistics statistics = statistics_of(args, plan);

  const auto run = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(width)::value;
    const ResidentArguments to{args.x,
                               columns,
                               Elementwise(args, plan),
                               residency::grid(plan, keeping, found, W),
                               make_team<T, W>(plan, keeping, found, places, workspace),
                               statistics};
    return launch_team(kForward, "batch_norm_forward_resident",
                       batch_norm_forward_resident<T, kLayout, W, decltype(act)>, found, to, act,
                       device, stream, done);
  };
  const char* error =
      dispatch_resident(kForward, shape, plan, {args.x, args.residual, args.y}, run);
  if (error != nullptr || !done || columns == nullptr || !statistics.runs()) return error;
  const FinishArguments finish{Known::columns, columns, 1, plan.ghosts, 1, nullptr, statistics};
  return forward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
