// Σ g² over all tensors, in double. Items are added by pieces whose number depends on the tensors'
// sizes only, and pieces in their order: the same bits for any number of blocks.
#pragma once
#include "kernels/cuda/optimizer_table.cuh"
#include "kernels/cuda/reduce.cuh"

namespace batchops::cuda::optimizer {

// Each block of a step adds up all of them.
constexpr int32_t kMostPieces = 2048;
// Loads ahead of the first use.
constexpr int kSquaresAhead = 8;

// Adds this thread's share.
template <class G, int W>
BATCHOPS_DEVICE void add_grad_squares(const Part& part, const Units& units, double& total) {
  const Memory<G> g(part.g, part.g_dtype(), units.begin);
  double sums[2] = {};  // so that one does not wait for the other
  for_each_unit<kSquaresAhead>(
      units, [&](int32_t i) { return g.template load<W>(i); },
      [&](const Unit<Held<G>, W>& raw, int32_t, int32_t) {
        float value[W];
        to_float<Held<G>, W>(raw, value);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          double& sum = sums[j % 2];
          sum = fma(static_cast<double>(value[j]), static_cast<double>(value[j]), sum);
        }
      });
  total += sums[0] + sums[1];
}
BATCHOPS_DEVICE void add_grad_squares(const Part& part, int32_t threads, double& total) {
  if (part.units > 0) {
    const Units wide = Units::wide(part, threads);
    with_element(part.g_dtype(), [&](auto type) {
      add_grad_squares<typename decltype(type)::type, kWidth>(part, wide, total);
    });
  }
  if (part.rest > 0) add_grad_squares<Any, 1>(part, Units::narrow(part, threads), total);
}

// Summed over the block, in every thread, by way of a place for each warp. It ends with a barrier.
template <int kBlock>
BATCHOPS_DEVICE double sum_of_block(double value, double* by_warp) {
  const double sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  double total = by_warp[0];
#pragma unroll
  for (int w = 1; w < kBlock / kWarp; ++w) total += by_warp[w];
  __syncthreads();
  return total;
}

struct GradSquares {
  int32_t items;   // of a piece
  int32_t pieces;  // in all
  double* sums;    // [pieces]

  GradSquares() = default;
  explicit GradSquares(const Table& table, double* place = nullptr) : sums(place) {
    items = (table.items() + kMostPieces - 1) / kMostPieces;
    pieces = items == 0 ? 0 : (table.items() + items - 1) / items;
  }

  // This block's pieces; back to front, so that the gradients that a step begins with are the last
  // ones read, and still in the L2 cache. Threads of a block beyond kThreads have nothing to add.
  template <int kBlock>
  BATCHOPS_DEVICE void add_up(const Table& table, double* by_warp) const {
    for (int32_t piece = pieces - 1 - static_cast<int32_t>(blockIdx.x); piece >= 0;
         piece -= static_cast<int32_t>(gridDim.x)) {
      double total = 0;
      const int32_t begin = piece * items;
      const int32_t end = begin + items < table.items() ? begin + items : table.items();
      for (int32_t item = end; threadIdx.x < kThreads && item-- > begin;) {
        if (item < table.chunks) {
          // Chunks of one tensor are one part.
          const Entry& x = table.entries[table.tensor_of[item]];
          const int32_t first = x.first_chunk > begin ? x.first_chunk : begin;
          add_grad_squares(Part::of_chunks(x, first, item + 1 - first), kThreads, total);
          item = first;
          continue;
        }
        const int32_t index =
            (item - table.chunks) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
        if (index < table.smalls) {
          const Entry& x = table.entries[table.tensor_of[table.chunks + index]];
          add_grad_squares(Part::whole(x), kWarp, total);
        }
      }
      total = sum_of_block<kBlock>(total, by_warp);
      if (threadIdx.x == 0) sums[piece] = total;
    }
  }

  // In every thread, once all pieces are there.
  template <int kBlock>
  BATCHOPS_DEVICE double total(double* by_warp) const {
    double total = 0;
#pragma unroll 8
    for (auto i = static_cast<int32_t>(threadIdx.x); threadIdx.x < kThreads && i < pieces;
         i += kThreads) {
      total += sums[i];
    }
    return sum_of_block<kBlock>(total, by_warp);
  }
};

}  // namespace batchops::cuda::optimizer
