// Where the batch norm kernels' threads look, for tensors far larger than memory: the kernels' own
// cutting into pieces and walking of pieces, with no tensor behind it.
#include "control.h"
#include "kernels/cuda/batch_norm.cuh"

using namespace batchops;
using namespace batchops::cuda;

namespace {

struct Entry {
  int64_t offset, row, column, channel, valid;
};

template <Layout kLayout, int W>
__global__ void chunk_places(const __grid_constant__ ChunkGrid grid, int64_t piece, Entry* out,
                             int64_t capacity, int64_t* batches) {
  const Chunk<kLayout, W> chunk(grid, piece);
  *batches = chunk.batches();
  if (*batches * kInFlight * kThreads > capacity) return;
  for (int batch = 0; batch < chunk.batches(); ++batch) {
    for (int u = 0; u < kInFlight; ++u) {
      const Place p = chunk.place(batch, u);
      out[(batch * kInFlight + u) * kThreads + threadIdx.x] = {
          p.offset, p.row, p.column, chunk.first_channel() + chunk.local(0), p.valid};
    }
  }
}

template <Layout kLayout, int W>
__global__ void piece_places(const __grid_constant__ ApplyGrid grid, int64_t index, Entry* out,
                             int64_t capacity, int64_t* batches) {
  Piece<kLayout, W> piece(grid, index);
  int64_t batch = 0;
  for (; piece.more(); piece.next(), ++batch) {
    if ((batch + 1) * kInFlight * kThreads > capacity) return;
    for (int u = 0; u < kInFlight; ++u) {
      int64_t channel = 0;
      const Place p = piece.place(u, channel);
      if constexpr (kLayout == Layout::channels_last) channel = piece.first_of_stats;
      out[(batch * kInFlight + u) * kThreads + threadIdx.x] = {p.offset, p.row, p.column, channel,
                                                               p.valid};
    }
  }
  *batches = batch;
}

// The piece that has the first element.
int64_t first_piece(const ApplyGrid& grid, Layout layout) {
  if (layout == Layout::channels_first) return 0;
  const int64_t length = grid.ghosts > 1 ? grid.length : grid.last_length;
  const int64_t batches = ceil_divide(length, grid.batch());
  return (grid.strands - batches % grid.strands) % grid.strands * grid.tiles.tiles;
}

}  // namespace

// Piece `piece` (negative: from the end) of step `step` ("chunk" or "apply") for units of `width`,
// on a device that runs `resident` blocks at once. `out` takes [batches · 4 · 256] entries, at most
// `capacity`; info gets pieces, batches, layout used, row length and the piece that has the first
// element.
EMULATOR_EXPORT int emulated_places(const BatchNormShape* shape, const char* step, int width,
                                    bool with_mask, int64_t resident, int64_t piece,
                                    int64_t capacity, Entry* out, int64_t* info, char* text,
                                    size_t size) {
  const Plan plan = make_plan(*shape, with_mask);
  info[2] = static_cast<int64_t>(plan.layout);
  info[3] = plan.row();
  const auto run = [&](auto layout, auto w) -> const char* {
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int W = decltype(w)::value;
    if (step[0] == 'c') {
      const ChunkGrid grid(plan, W);
      info[0] = grid.pieces;
      info[4] = 0;
      const int64_t index = piece < 0 ? grid.pieces + piece : piece;
      return launch("chunk_places", chunk_places<kLayout, W>, 1, kThreads, 0, nullptr, grid, index,
                    out, capacity, info + 1);
    }
    const ApplyGrid grid(plan, W, with_mask, resident);
    info[0] = grid.pieces;
    info[4] = first_piece(grid, kLayout);
    const int64_t index = piece < 0 ? grid.pieces + piece : piece;
    return launch("piece_places", piece_places<kLayout, W>, 1, kThreads, 0, nullptr, grid, index,
                  out, capacity, info + 1);
  };
  return cuda_emulator::guarded(text, size, [&] {
    return dispatch_layout(plan.layout, [&](auto layout) {
      if (width == 8) return run(layout, std::integral_constant<int, 8>{});
      if (width == 4) return run(layout, std::integral_constant<int, 4>{});
      return run(layout, std::integral_constant<int, 1>{});
    });
  });
}

EMULATOR_EXPORT void emulated_quotients(const uint32_t* numerators, const uint32_t* divisors,
                                        uint32_t* quotients, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    quotients[i] = FastDivide(divisors[i]).quotient(numerators[i]);
  }
}
