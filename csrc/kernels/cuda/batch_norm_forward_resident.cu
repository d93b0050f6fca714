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
      moments_of<true>(
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

// The bits of `kAhead` units of each thread, of which planes' rows are made.
template <int kAhead>
struct Cells {
  uint8_t of[kAhead][kThreads + 2];
};

// Makes the mask's bytes of the samples that `cells` has units of. All threads.
template <int kAhead, int W>
BATCHOPS_DEVICE void store_mask_of_planes(const PlanesChunk<W>& chunk, const Elementwise& args,
                                          int first_unit, const Cells<kAhead>& cells) {
  const int bytes = static_cast<int>(args.mask_row);
  const int plane = static_cast<int>(chunk.grid.HxW);
  const int of_sample = chunk.channels() * bytes;
  const int rows = chunk.grid.tiles.rows_at_once;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kAhead * rows * of_sample; i += kThreads) {
    const int step = i / of_sample;
    const int in_sample = i - step * of_sample;
    const int channel = in_sample / bytes;
    const int byte = in_sample - channel * bytes;
    const int u = step / rows;
    const int row = step - u * rows;
    const unsigned sample = static_cast<unsigned>((first_unit + u) * rows + row);
    if (sample >= chunk.at.length) continue;
    const int from = channel * plane + byte * 8;
    const uint8_t* cell = cells.of[u] + row * chunk.grid.tiles.tile + from / W;
    unsigned bits = cell[0] | unsigned{cell[1]} << W;
    if constexpr (W == 4) bits |= unsigned{cell[2]} << (2 * W);
    bits >>= from % W;
    const int left = plane - byte * 8;
    if (left < 8) bits &= (1u << left) - 1u;
    args.mask[((chunk.at.begin + sample) * chunk.grid.C + chunk.first_channel()) * bytes +
              in_sample] = static_cast<uint8_t>(bits);
  }
  __syncthreads();
}

// channels_first: a set is a ghost batch's channel, or as many as have their planes taken together.
template <class T, int W, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, blocks_where_flowing<Act>(kPlanes))
    batch_norm_forward_flow(const __grid_constant__ ResidentArguments args,
                            const __grid_constant__ Act act) {
  using MyChunk = std::conditional_t<kPlanes, PlanesChunk<W>, Chunk<Layout::channels_first, W>>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kAhead = kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  using MyCells = std::conditional_t<kPlanes && Act::kMaskable, Cells<kAhead>, int>;
  BATCHOPS_SHARED(cells, MyCells);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const Team& team = args.team;
  const Statistics& s = args.statistics;
  const Passing<Moments, Affine> passing{team};
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
  Kept<T, W> other{bytes + team.kept * kThreads * static_cast<int>(sizeof(Unit<T, W>)), team.kept};

  for (;; before = set, set += teams) {
    if (set < team.sets) {
      int64_t ghost;
      const MyChunk chunk(args.grid, piece_of(set, ghost));
      Moments found[kChannels];
      moments_of<true>(
          chunk, x,
          [&](int i, const Unit<T, W>& unit) {
            if (kept.has(i)) kept.at(0, i) = unit;
          },
          scratch, found);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.writes(j)) passing.sums(set, rank, chunk.local(j)) = found[j];
      }
      if (passing.arrive(set)) {
        const int64_t M = s.count(ghost);
        int channel = 0;
        bool writes = threadIdx.x == 0;
        MeanAndVariance all;
        if constexpr (kPlanes) {
          channel = static_cast<int>(threadIdx.x) / kWarp;
          writes = threadIdx.x % kWarp == 0 && channel < chunk.channels();
          const int of = channel < chunk.channels() ? channel : 0;
          all = merge_ahead<1>(
              M, team.parts, static_cast<int>(threadIdx.x) % kWarp, kWarp,
              [&](int64_t k) { return passing.sums(set, k, of); },
              [](double (&sums)[2]) {
                sums[0] = warp_sum(sums[0]);
                sums[1] = warp_sum(sums[1]);
              });
        } else {
          all =
              merge_in_block<1>(M, team.parts, [&](int64_t k) { return passing.sums(set, k, 0); });
        }
        if (writes) {
          const int64_t c = chunk.first_channel() + channel;
          passing.result(set, channel) =
              s.store(ghost, c, all.mean, all.square / static_cast<double>(M));
          if (args.columns == nullptr) {
            s.update(c, all.mean, all.square);
          } else {
            const float high = static_cast<float>(all.mean);
            const double low = (all.mean - high) * static_cast<double>(M);
            args.columns[c * s.ghosts + ghost] = {high, static_cast<float>(low),
                                                  static_cast<float>(all.square),
                                                  static_cast<float>(M)};
          }
        }
        passing.tell(set);
      }
    }
    if (before >= 0) {
      int64_t ghost;
      const MyChunk chunk(args.grid, piece_of(before, ghost));
      passing.wait(before);
      Affine affine[kPlanes ? 2 : 1];
      affine[0] = passing.result(before, chunk.local(0));
      if constexpr (kPlanes) affine[1] = passing.result(before, chunk.local(W - 1));
      for (int batch = chunk.batches() - 1; batch >= 0; --batch) {
#pragma unroll 1
        for (int part = 0; part < kInFlight; part += kAhead) {
          Place places[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
          const auto load = [&](int u, const Place& place) {
            const int i = batch * kInFlight + part + u;
            return other.has(i) ? other.at(0, i) : load_unit<T, W>(x + place.offset);
          };
          if constexpr (kPlanes) {
            normalise<T, W, kAhead>(
                args.elementwise, act, places, load,
                [&](int, int j) { return j < chunk.split ? affine[0] : affine[1]; },
                [&](int u, const Place&, unsigned bits) {
                  if constexpr (Act::kMaskable) {
                    cells.of[u][threadIdx.x] = static_cast<uint8_t>(bits);
                  }
                });
            if constexpr (Act::kMaskable) {
              if (args.elementwise.mask != nullptr) {
                store_mask_of_planes(chunk, args.elementwise, batch * kInFlight + part, cells);
              }
            }
          } else {
            normalise<T, W, kAhead>(args.elementwise, act, places, load,
                                    [&](int, int) { return affine[0]; });
          }
        }
      }
    }
    if (set >= team.sets) break;
    const Kept<T, W> next = other;
    other = kept;
    kept = next;
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

bool teams_of_rows = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_TEAMS");
  return said == nullptr || std::strcmp(said, "0") != 0;
}();

bool flows = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_FLOW");
  return said == nullptr || std::strcmp(said, "0") != 0;
}();

bool together = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_PLANES");
  return said == nullptr || std::strcmp(said, "0") != 0;
}();

int spared_multiprocessors = [] {
  const char* said = std::getenv("BATCHOPS_CUDA_SM_MARGIN");
  return said == nullptr ? 0 : std::max(0, std::atoi(said));
}();

size_t forward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool mask,
                                  const Device& device) {
  const Keeping keeping = keeping_of(shape, mask);
  return team_bytes(plan, keeping, device) + columns_bytes(plan);
}

const char* forward_resident(const BatchNormForward& args, const Plan& plan, void* workspace,
                             int device, void* stream, bool& done) {
  const BatchNormShape& shape = args.shape;
  Device on;
  if (const char* error = query(kForward, device, on)) return error;
  const Keeping keeping = keeping_of(shape, walks_mask(args));
  const Residency found = residency_for(plan, keeping, on, {args.x, args.residual, args.y});
  if (!found.possible) return nullptr;
  const TeamPlaces places(found, keeping);
  auto* columns =
      plan.ghosts == 1
          ? nullptr
          : reinterpret_cast<Moments*>(static_cast<unsigned char*>(workspace) + places.bytes());
  const Statistics statistics = statistics_of(args, plan);

  const auto run_planes = [&](auto type, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const ResidentArguments to{args.x,
                               columns,
                               Elementwise(args, plan),
                               residency::grid(plan, keeping, found, W),
                               make_team<T, W>(plan, keeping, found, places, workspace),
                               statistics};
    return launch_team(kForward, "batch_norm_forward_flow",
                       batch_norm_forward_flow<T, W, true, decltype(act)>, found, to, act, device,
                       stream, done);
  };
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
    if constexpr (kLayout == Layout::channels_first) {
      if (found.flow) {
        return launch_team(kForward, "batch_norm_forward_flow",
                           batch_norm_forward_flow<T, W, false, decltype(act)>, found, to, act,
                           device, stream, done);
      }
    }
    return launch_team(kForward, "batch_norm_forward_resident",
                       batch_norm_forward_resident<T, kLayout, W, decltype(act)>, found, to, act,
                       device, stream, done);
  };
  const char* error =
      found.planes ? dispatch_planes(kForward, shape, run_planes)
                   : dispatch_resident(kForward, shape, plan, {args.x, args.residual, args.y}, run);
  if (error != nullptr || !done || columns == nullptr || !statistics.runs()) return error;
  const FinishArguments finish{Known::columns, columns, 1, plan.ghosts, 1, nullptr, statistics};
  return forward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
