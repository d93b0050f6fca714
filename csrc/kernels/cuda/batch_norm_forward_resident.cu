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

// channels_last.
template <class T, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_forward_resident(const __grid_constant__ ResidentArguments args,
                                const __grid_constant__ Act act) {
  using MyChunk = Chunk<Layout::channels_last, W>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kAhead = kLoadsAhead<Act>;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(moments, Moments[kMostResidentTile]);
  BATCHOPS_SHARED(affines, Affine[kMostResidentTile]);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* const from[] = {x};
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
      const Bringing<1, MyChunk, T, W> bringing{chunk, kept, from, 1};
      bringing.start();
      moments_of<true, T>(
          chunk, [&](int batch) { bringing.ready(batch); },
          [&](int i, const auto& place) {
            return kept.has(i) ? kept.at(0, i) : load_unit<T, W>(x + place().offset);
          },
          scratch, [&](int j, const Moments& found) { meeting.place()[chunk.local(j)] = found; });
    }
    meeting.meet();
    const MyChunk chunk(args.grid, forgotten(piece));
    const int channels = chunk.channels();
    meeting.for_channels(channels, [&](int r, int lane, int lanes) {
      const int channel = r < channels ? r : 0;
      const int64_t c = chunk.first_channel() + channel;
      const int64_t M = s.count(ghost);
      const Parameters::Pair own = s.parameters.of(c);
      const MeanAndVariance found = merge_ahead<4>(
          M, team.parts, lane, lanes,
          [&](int64_t k) { return meeting.of(static_cast<int>(k), channel); },
          [lanes](double (&sums)[2]) {
            sums[0] = sum_of_lanes(sums[0], lanes);
            sums[1] = sum_of_lanes(sums[1], lanes);
          });
      if (r >= channels || lane != 0) return;
      affines[r] =
          s.store(ghost, c, found.mean, found.square / static_cast<double>(M), own, rank == 0);
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
    meeting.leave();

    AffineOf<T> affine[kChannels] = {};
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (chunk.has_channel(j)) affine[j] = AffineOf<T>(affines[chunk.local(j)]);
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

// What is left to do with the statistics of a column.
struct Pending {
  MeanAndVariance all;
  int64_t ghost, c;
};

// channels_first: a set is a ghost batch's channel, or as many as have their planes taken together.
// What is kept of a set is on its way while the one before is normalised.
template <class T, int W, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, blocks_where_flowing<Act>(kPlanes, W == 8, false))
    batch_norm_forward_flow(const __grid_constant__ ResidentArguments args,
                            const __grid_constant__ Act act) {
  using MyChunk = std::conditional_t<kPlanes, PlanesChunk<W>, FlowChunk<W>>;
  constexpr int kMost = kPlanes ? kThreads / kWarp : 1;
  constexpr int kAhead = kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  using MyCells = std::conditional_t<kPlanes && Act::kMaskable, Cells<kAhead>, int>;
  BATCHOPS_SHARED(cells, MyCells);
  BATCHOPS_SHARED(own_moments, Moments[2 * kMost]);
  BATCHOPS_SHARED(affines, Affine[kMost]);
  BATCHOPS_SHARED(pending, Pending[kMost]);
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* const from[] = {x};
  const Team& team = args.team;
  const Statistics& s = args.statistics;
  const Passing<Moments> passing{team, own_moments, kMost};
  const int rank = static_cast<int>(blockIdx.x % team.parts);
  const int teams = static_cast<int>(gridDim.x) / team.parts;
  const auto chunk_of = [&](int64_t set) {
    const int64_t ghost = args.grid.ghosts > 1 ? set / args.grid.across : 0;
    return MyChunk(args.grid, ChunkPlace(args.grid, set - ghost * args.grid.across, ghost, rank));
  };
  // Of two sets in turn.
  const int of_set = team.kept * kThreads * static_cast<int>(sizeof(Unit<T, W>));
  const auto kept_of = [&](unsigned turn) {
    return Kept<T, W>{bytes + (turn % 2 == 0 ? 0 : of_set), team.kept};
  };
  const auto bring = [&](int64_t set, unsigned turn) {
    if (set < team.sets) {
      const MyChunk chunk = chunk_of(set);
      const Kept<T, W> kept = kept_of(turn);
      for (int batch = 0; batch * kInFlight < kept.units; ++batch) {
        bring_batch(chunk, batch, kept, from, 1);
      }
    }
    __pipeline_commit();
  };
  // A warp merges a channel. Each block of the team in turn does what one has to.
  const auto channel_of_warp = [] { return forgotten(static_cast<int>(threadIdx.x)) / kWarp; };
  const int channels = kPlanes ? args.grid.together : 1;
  const auto is_mine = [&](unsigned turn) {
    return turn % static_cast<unsigned>(team.parts) == static_cast<unsigned>(rank);
  };
  // The set whose sums are next; of the one before they have been left.
  int64_t set = blockIdx.x / team.parts;
#pragma unroll 1
  for (unsigned turn = 0; turn < 2; ++turn) bring(set + turn * teams, turn);

  for (unsigned turn = 0;; set += teams, ++turn) {
    const int64_t before = set - teams;
    if (set < team.sets) {
      const MyChunk chunk = chunk_of(set);
      const Kept<T, W> kept = kept_of(turn);
      if (turn == 0) {
        __pipeline_wait_prior(1);
      } else {
        __pipeline_wait_prior(0);
      }
      keep_order();
      moments_of<true, T>(
          chunk, [](int) {},
          [&](int i, const auto& place) {
            return kept.has(i) ? kept.at(0, i) : load_unit<T, W>(x + place().offset);
          },
          scratch,
          [&](int j, const Moments& found) {
            passing.sums(set, turn, rank, chunk.local(j)) = found;
          });
      passing.arrive(set);
    } else {
      __syncthreads();  // all have read `affines`
    }
    if (turn > 0) {
      const MyChunk chunk = chunk_of(forgotten(before));
      if (const int channel = channel_of_warp(); channel < channels) {
        const int64_t c = chunk.first_channel() + channel;
        const int64_t M = s.count(chunk.at.ghost);
        const Parameters::Pair own = s.parameters.of(c);
        passing.wait(before);
        const MeanAndVariance all = merge_ahead<2>(
            M, team.parts, static_cast<int>(threadIdx.x) % kWarp, kWarp,
            [&](int64_t k) { return passing.sums(before, turn - 1, k, channel); },
            [](double (&sums)[2]) {
              sums[0] = warp_sum(sums[0]);
              sums[1] = warp_sum(sums[1]);
            });
        if (threadIdx.x % kWarp == 0) {
          affines[channel] = s.store(chunk.at.ghost, c, all.mean,
                                     all.square / static_cast<double>(M), own, is_mine(turn - 1));
          pending[channel] = {all, chunk.at.ghost, c};
        }
      }
      __syncthreads();
      AffineOf<T> affine[kPlanes ? 2 : 1];
      affine[0] = AffineOf<T>(affines[chunk.local(0)]);
      if constexpr (kPlanes) affine[1] = AffineOf<T>(affines[chunk.local(W - 1)]);
      const Kept<T, W> other = kept_of(turn - 1);
      const bool along = kCopies<T, W> && args.grid.ghosts == 1 && set + teams < team.sets;
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
          if constexpr (kCopies<T, W>) {
            // Their places are free for those of the next set but one, which lie as these do.
            if (!along) continue;
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
              const int i = batch * kInFlight + part + u;
              if (!other.has(i) || !places[u].valid) continue;
              bring_unit(other, i, from, 1,
                         places[u].offset + int64_t{2} * teams * args.grid.of_set());
            }
          }
        }
      }
      if (along) {
        __pipeline_commit();
      } else {
        bring(set + teams, turn - 1);
      }
      if (const int channel = channel_of_warp();
          channel < channels && threadIdx.x % kWarp == 0 && is_mine(turn - 1)) {
        const Pending& of = pending[channel];
        const double M = static_cast<double>(s.count(of.ghost));
        if (args.columns == nullptr) {
          s.update(of.c, of.all.mean, of.all.square);
        } else {
          const float high = static_cast<float>(of.all.mean);
          args.columns[of.c * s.ghosts + of.ghost] = {
              high, static_cast<float>((of.all.mean - high) * M), static_cast<float>(of.all.square),
              static_cast<float>(M)};
        }
      }
    }
    if (set >= team.sets) break;
  }
}

Keeping keeping_of(const BatchNormShape& shape, bool mask) {
  return {1, static_cast<int>(size_of(shape.dtype)), sizeof(Moments), mask};
}

struct Kernels {
  static constexpr const char* flow_name = "batch_norm_forward_flow";
  static constexpr const char* resident_name = "batch_norm_forward_resident";

  template <class T, int W, bool kPlanes, class Act>
  static auto flow() {
    return batch_norm_forward_flow<T, W, kPlanes, Act>;
  }
  template <class T, int W, class Act>
  static auto resident() {
    return batch_norm_forward_resident<T, W, Act>;
  }
};

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
  return team_bytes(plan, keeping, device) + columns_bytes<Moments>(plan);
}

const char* forward_resident(const BatchNormForward& args, const Plan& plan, void* workspace,
                             int device, void* stream, bool& done) {
  const BatchNormShape& shape = args.shape;
  Device on;
  if (const char* error = query(kForward, device, on)) return error;
  const Keeping keeping = keeping_of(shape, walks_mask(args));
  const std::initializer_list<const void*> pointers = {args.x, args.residual, args.y};
  const Residency found = residency_for(plan, keeping, on, pointers);
  if (!found.possible) return nullptr;
  Moments* columns = nullptr;
  const Statistics statistics = statistics_of(args, plan);
  const auto launched = [&](const char* name, auto type, auto width, auto act, auto kernel) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const auto make = [&](const Residency& cut) {
      const TeamPlaces places(cut, keeping);
      columns = columns_of<Moments>(plan, places, workspace);
      return ResidentArguments{args.x,
                               columns,
                               Elementwise(args, plan),
                               residency::grid(plan, keeping, cut, W),
                               make_team<T, W>(plan, keeping, cut, places, workspace),
                               statistics};
    };
    return launch_team(kForward, name, kernel, plan, keeping, found, make, act, device, stream,
                       done);
  };
  const char* error =
      dispatch_kernel<Kernels>(kForward, shape, plan, found, pointers, false, launched);
  if (error != nullptr || !done || columns == nullptr || !statistics.runs()) return error;
  const FinishArguments finish{Known::columns, columns, 1, plan.ghosts, 1, nullptr, statistics};
  return forward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
