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

// The tensors that are kept, in their order.
template <class T, int kTensors>
struct From {
  const T* of[kTensors];

  BATCHOPS_DEVICE explicit From(const Tensors& tensors) {
    of[0] = static_cast<const T*>(tensors.dy);
    of[1] = static_cast<const T*>(tensors.x);
    if constexpr (kTensors > 2) of[2] = static_cast<const T*>(tensors.residual);
  }
};

// The thread's i-th unit of each tensor, which lies at place().
template <class T, int W, class MyFetch, class PlaceOf>
BATCHOPS_DEVICE void get(const Kept<T, W>& kept, const MyFetch& fetch, int count, int i,
                         const PlaceOf& place, Loaded<T, W>& to) {
  if (!kept.has(i)) return fetch(place(), to);
  to.dy = kept.at(0, i);
  to.x = kept.at(1, i);
  if (count > 2) to.residual = kept.at(2, i);
}

BATCHOPS_DEVICE bool writes_elements(const Tensors& tensors) {
  return tensors.dx != nullptr || tensors.dresidual != nullptr;
}

// The sums of parts lane, lane + lanes, … with several on their way at once.
template <int kAhead, class Get>
BATCHOPS_DEVICE void add_up(int parts, int lane, int lanes, Get get, double (&to)[2]) {
  for (int k = lane; k < parts; k += kAhead * lanes) {
    float2 of[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      of[u] = k + u * lanes < parts ? get(k + u * lanes) : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      to[0] += of[u].x;
      to[1] += of[u].y;
    }
  }
}

// channels_last.
template <class T, int W, class Act>
__global__ void __launch_bounds__(kThreads, kLeastResident)
    batch_norm_backward_resident(const __grid_constant__ ResidentArguments args,
                                 const __grid_constant__ Act act) {
  using MyChunk = Chunk<Layout::channels_last, W>;
  constexpr int kChannels = MyChunk::kChannels;
  // Large units leave few registers, so that fewer are loaded ahead, and many channels a thread
  // even less: there coefficients are read from shared memory again for each unit.
  constexpr bool kCrowded = kChannels == 8;
  constexpr int kAhead = W < 8 ? kLoadsAhead<Act> : kCrowded && kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(own_sums, float2[kMostResidentTile]);
  using Table = std::conditional_t<kCrowded, AffineTable<T, kMostResidentTile>, int>;
  using Directions = std::conditional_t<kCrowded, DirectionTable<T, kMostResidentTile>,
                                        DirectionOf<T>[kMostResidentTile]>;
  BATCHOPS_SHARED(directions, Directions);
  BATCHOPS_SHARED(table, Table);
  const Tensors& tensors = args.tensors;
  constexpr int kTensors = kMayAdd<Act> ? 3 : 2;
  const From<T, kTensors> from(tensors);
  const Fetch<T, W, kMayAdd<Act>> fetch(tensors);
  const int count = kMayAdd<Act> && tensors.residual != nullptr ? 3 : 2;
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
      const Bringing<kTensors, MyChunk, T, W> bringing{chunk, kept, from.of, count};
      bringing.start();
      const int channels = chunk.channels();
      AffineOf<T> affine[kCrowded ? 1 : kChannels] = {};
      if constexpr (kCrowded) {
        for (int r = threadIdx.x; r < channels; r += kThreads) {
          table.set(r, AffineOf<T>(g.affine(ghost, chunk.first_channel() + r)));
        }
        __syncthreads();
      } else {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          if (chunk.has_channel(j)) {
            affine[j] = AffineOf<T>(g.affine(ghost, chunk.first_channel() + chunk.local(j)));
          }
        }
      }
      float sums[2][kChannels];
      sums_of<T, kAhead, true>(
          chunk, tensors, act, affines_of<W>(table, affine, chunk),
          [&](int batch) { bringing.ready(batch); },
          [&](int i, const auto& place, Loaded<T, W>& to) {
            get(kept, fetch, count, i, place, to);
          },
          scratch, sums);
      if (chunk.writes_any()) {
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
      const int64_t c = chunk.first_channel() + channel;
      const Column column = g.column(ghost, c);
      double all[2] = {};
      add_up<4>(team.parts, lane, lanes, [&](int k) { return meeting.of(k, channel); }, all);
      const double sum = sum_of_lanes(all[0], lanes);
      const double product = sum_of_lanes(all[1], lanes);
      if (r >= channels || lane != 0) return;
      const ColumnSums of_column = g.sums(column, sum, product);
      const DirectionOf<T> found(g.direction(column, ghost, of_column));
      if constexpr (kCrowded) {
        directions.set(r, found);
      } else {
        directions[r] = found;
      }
      if (rank != 0) return;
      if (args.columns == nullptr) {
        g.store(c, of_column);
      } else {
        args.columns[c * g.ghosts + ghost] =
            make_float2(static_cast<float>(sum), static_cast<float>(product));
      }
    });
    meeting.leave();

    DirectionOf<T> direction[kCrowded ? 1 : kChannels] = {};
    if constexpr (!kCrowded) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.has_channel(j)) direction[j] = directions[chunk.local(j)];
      }
    }
    for (int batch = writes_elements(tensors) ? chunk.batches() - 1 : -1; batch >= 0; --batch) {
#pragma unroll 1
      for (int part = 0; part < kInFlight; part += kAhead) {
        Place places[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
        const int unit = chunk.local(0) / W;
        propagate<T, W, kAhead, kCrowded ? MyChunk::kAtOnce : W>(
            tensors, act, places,
            [&](int u, const Place& place, Loaded<T, W>& to) {
              const auto there = [&] { return place; };
              get(kept, fetch, count, batch * kInFlight + part + u, there, to);
            },
            [&](int, int first) {
              if constexpr (kCrowded) {
                return four_of<DirectionOf<T>>(directions, unit, first);
              } else {
                return [&](int j) { return direction[j % kChannels]; };
              }
            });
      }
    }
    meeting.part();
  }
}

// channels_first: a set is a ghost batch's channel, or as many as have their planes taken together.
// What is kept of a set is on its way while dx of the one before is made.
template <class T, int W, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, blocks_where_flowing<Act>(kPlanes, W == 8, true))
    batch_norm_backward_flow(const __grid_constant__ ResidentArguments args,
                             const __grid_constant__ Act act) {
  using MyChunk = std::conditional_t<kPlanes, PlanesChunk<W>, FlowChunk<W>>;
  constexpr int kChannels = MyChunk::kChannels;
  constexpr int kMost = kPlanes ? kThreads / kWarp : 1;
  constexpr int kAhead = kAnyActivation<Act> ? 1 : 2;
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  BATCHOPS_SHARED(scratch, typename MyChunk::Scratch);
  BATCHOPS_SHARED(own_sums, float2[2 * kMost]);
  BATCHOPS_SHARED(columns, Column[2][kMost]);  // of sets in turn
  BATCHOPS_SHARED(directions, DirectionOf<T>[kMost]);
  const Tensors& tensors = args.tensors;
  constexpr int kTensors = kMayAdd<Act> ? 3 : 2;
  const From<T, kTensors> from(tensors);
  const Fetch<T, W, kMayAdd<Act>> fetch(tensors);
  const int count = kMayAdd<Act> && tensors.residual != nullptr ? 3 : 2;
  const Team& team = args.team;
  const Gradients& g = args.gradients;
  const Passing<float2> passing{team, own_sums, kMost};
  const int rank = static_cast<int>(blockIdx.x % team.parts);
  const int teams = static_cast<int>(gridDim.x) / team.parts;
  const auto chunk_of = [&](int64_t set) {
    const int64_t ghost = args.grid.ghosts > 1 ? set / args.grid.across : 0;
    return MyChunk(args.grid, ChunkPlace(args.grid, set - ghost * args.grid.across, ghost, rank));
  };
  // Of two sets in turn.
  const int of_set = count * team.kept * kThreads * static_cast<int>(sizeof(Unit<T, W>));
  const auto kept_of = [&](unsigned turn) {
    return Kept<T, W>{bytes + (turn % 2 == 0 ? 0 : of_set), team.kept};
  };
  const auto bring = [&](int64_t set, unsigned turn) {
    if (set < team.sets) {
      const MyChunk chunk = chunk_of(set);
      const Kept<T, W> kept = kept_of(turn);
      for (int batch = 0; batch * kInFlight < kept.units; ++batch) {
        bring_batch(chunk, batch, kept, from.of, count);
      }
    }
    __pipeline_commit();
  };
  // A warp for each of a set's channels.
  const auto channel_of_warp = [] { return forgotten(static_cast<int>(threadIdx.x)) / kWarp; };
  const int channels = kPlanes ? args.grid.together : 1;
  const auto column_of = [&](int64_t set, int channel) {
    const int64_t ghost = set / args.grid.across;
    return g.column(ghost, (set - ghost * args.grid.across) * args.grid.together + channel);
  };
  // The set whose sums are next; of the one before they have been left.
  int64_t set = blockIdx.x / team.parts;
#pragma unroll 1
  for (unsigned turn = 0; turn < 2; ++turn) bring(set + turn * teams, turn);
  if (const int channel = channel_of_warp(); channel < channels && threadIdx.x % kWarp == 0) {
    columns[0][channel] = column_of(set, channel);
  }
  __syncthreads();

  for (unsigned turn = 0;; set += teams, ++turn) {
    const int64_t before = set - teams;
    if (set < team.sets) {
      const MyChunk chunk = chunk_of(set);
      const Kept<T, W> kept = kept_of(turn);
      AffineOf<T> affine[kPlanes ? 2 : 1];
      affine[0] = AffineOf<T>(columns[turn % 2][chunk.local(0)].affine());
      if constexpr (kPlanes) {
        affine[1] = AffineOf<T>(columns[turn % 2][chunk.local(W - 1)].affine());
      }
      if (turn == 0) {
        __pipeline_wait_prior(1);
      } else {
        __pipeline_wait_prior(0);
      }
      keep_order();
      float sums[2][kChannels];
      sums_of<T, kAhead, true>(
          chunk, tensors, act,
          [&](int first) {
            return [&, first](int j) {
              if constexpr (kPlanes) return first + j < chunk.split ? affine[0] : affine[1];
              return affine[0];
            };
          },
          [](int) {},
          [&](int i, const auto& place, Loaded<T, W>& to) {
            get(kept, fetch, count, i, place, to);
          },
          scratch, sums);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (chunk.writes(j)) {
          passing.sums(set, turn, rank, chunk.local(j)) = make_float2(sums[0][j], sums[1][j]);
        }
      }
      passing.arrive(set);
    } else {
      __syncthreads();  // all have read `directions`
    }
    if (const int channel = channel_of_warp(); channel < channels) {
      const bool writes = threadIdx.x % kWarp == 0;
      Column following{};
      if (set + teams < team.sets && writes) following = column_of(set + teams, channel);
      if (turn > 0) {
        // Each block of the team in turn does what one has to.
        const bool mine =
            (turn - 1) % static_cast<unsigned>(team.parts) == static_cast<unsigned>(rank);
        passing.wait(before);
        double all[2] = {};
        add_up<2>(
            team.parts, static_cast<int>(threadIdx.x) % kWarp, kWarp,
            [&](int k) { return passing.sums(before, turn - 1, k, channel); }, all);
        all[0] = warp_sum(all[0]);
        all[1] = warp_sum(all[1]);
        if (writes) {
          const int64_t ghost = before / args.grid.across;
          const int64_t c = (before - ghost * args.grid.across) * args.grid.together + channel;
          const Column column = columns[(turn - 1) % 2][channel];
          const ColumnSums of_column = g.sums(column, all[0], all[1]);
          directions[channel] = DirectionOf<T>(g.direction(column, ghost, of_column));
          if (mine && args.columns == nullptr) {
            g.store(c, of_column);
          } else if (mine) {
            args.columns[c * g.ghosts + ghost] =
                make_float2(static_cast<float>(all[0]), static_cast<float>(all[1]));
          }
        }
      }
      if (writes) columns[(turn + 1) % 2][channel] = following;
    }
    __syncthreads();
    if (turn > 0) {
      const MyChunk chunk = chunk_of(forgotten(before));
      DirectionOf<T> direction[kPlanes ? 2 : 1];
      direction[0] = directions[chunk.local(0)];
      if constexpr (kPlanes) direction[1] = directions[chunk.local(W - 1)];
      const Kept<T, W> other = kept_of(turn - 1);
      const bool elements = writes_elements(tensors);
      const bool along =
          kCopies<T, W> && elements && args.grid.ghosts == 1 && set + teams < team.sets;
      for (int batch = elements ? chunk.batches() - 1 : -1; batch >= 0; --batch) {
#pragma unroll 1
        for (int part = 0; part < kInFlight; part += kAhead) {
          Place places[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) places[u] = chunk.place(batch, part + u);
          propagate<T, W, kAhead, W>(
              tensors, act, places,
              [&](int u, const Place& place, Loaded<T, W>& to) {
                const auto there = [&] { return place; };
                get(other, fetch, count, batch * kInFlight + part + u, there, to);
              },
              [&](int, int) {
                return [&](int j) {
                  if constexpr (kPlanes) return j < chunk.split ? direction[0] : direction[1];
                  return direction[0];
                };
              },
              [&](const Place& place) {
                return bits_of(chunk, tensors.mask, tensors.mask_row, place);
              });
          if constexpr (kCopies<T, W>) {
            // Their places are free for those of the next set but one, which lie as these do.
            if (!along) continue;
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
              const int i = batch * kInFlight + part + u;
              if (!other.has(i) || !places[u].valid) continue;
              bring_unit(other, i, from.of, count,
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
    }
    if (set >= team.sets) break;
  }
}

Keeping keeping_of(const BatchNormShape& shape, bool residual) {
  // Without a mask to write, rows need no padding.
  return {residual ? 3 : 2, static_cast<int>(size_of(shape.dtype)), sizeof(float2), false};
}

struct Kernels {
  static constexpr const char* flow_name = "batch_norm_backward_flow";
  static constexpr const char* resident_name = "batch_norm_backward_resident";

  template <class T, int W, bool kPlanes, class Act>
  static auto flow() {
    return batch_norm_backward_flow<T, W, kPlanes, Act>;
  }
  template <class T, int W, class Act>
  static auto resident() {
    return batch_norm_backward_resident<T, W, Act>;
  }
};

}  // namespace batch_norm_backward_resident_cu

size_t backward_resident_workspace(const Plan& plan, const BatchNormShape& shape, bool residual,
                                   const Device& device) {
  const Keeping keeping = keeping_of(shape, residual);
  return team_bytes(plan, keeping, device) + columns_bytes<float2>(plan);
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
  float2* columns = nullptr;
  const Gradients gradients = gradients_of(args, plan);
  const auto launched = [&](const char* name, auto type, auto width, auto act, auto kernel) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const auto make = [&](const Residency& cut) {
      const TeamPlaces places(cut, keeping);
      columns = columns_of<float2>(plan, places, workspace);
      return ResidentArguments{tensors, columns, residency::grid(plan, keeping, cut, W),
                               make_team<T, W>(plan, keeping, cut, places, workspace), gradients};
    };
    return launch_team(kBackward, name, kernel, plan, keeping, found, make, act, device, stream,
                       done);
  };
  const char* error = dispatch_kernel<Kernels>(kBackward, shape, plan, found, pointers,
                                               tensors.residual != nullptr, launched);
  const bool wants_parameters = args.dweight != nullptr || args.dbias != nullptr;
  if (error != nullptr || !done || columns == nullptr || !wants_parameters) return error;
  const GradientFinishArguments finish{columns, 1,       plan.ghosts, true,
                                       1,       nullptr, nullptr,     gradients};
  return backward_finish(finish, device, stream);
}

}  // namespace batchops::cuda
