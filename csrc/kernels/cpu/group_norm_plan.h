// How the CPU group norm cuts a tensor. Everything here depends on the shape only, never on the
// number of threads, so that the same sums are formed in the same order on any machine.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/cpu/norm_plan.h"
#include "kernels/group_norm.h"

namespace batchops {

// Three ways through memory. A unit is what one thread can finish by itself; a unit of several
// chunks may be shared out where there are fewer units than threads.
//
//   planes  channels_first. Unit: a group, which is one stretch of memory, D planes of HxW values.
//   rows    HxW of 1, or small and channels_first. Unit: a sample, which is one row of memory; its
//           groups are stretches of that row. Column j belongs to channel j / HxW.
//   pixels  channels_last. Unit: a sample, rows of `repeat` pixels of C values; column j belongs
//           to channel j % C. The pixels left over form one short last row of `tail` columns.
struct GroupNormPlan {
  enum Kind { planes, rows, pixels } kind = planes;
  int64_t D = 1;  // channels a group
  int64_t M = 1;  // values a group
  int64_t units = 1;
  int64_t chunks = 1;          // of a unit
  int64_t chunk_elements = 1;  // planes: about; see begin_of_chunk()
  int64_t chunk_rows = 1;      // pixels
  int64_t width = 1;           // columns of a row
  int64_t repeat = 1;
  int64_t steps = 1;  // rows of a sample
  int64_t tail = 0;
  // dweight and dbias are summed over the samples of a block, then over the blocks.
  int64_t blocks = 1;
  int64_t block_samples = 1;
};

inline GroupNormPlan plan_group_norm(const GroupNormShape& shape) {
  constexpr int64_t kShortPlane = 16;  // HxW below which a plane may be shorter than a vector
  constexpr int64_t kChunkElements = 65536;
  constexpr int64_t kMinWidth = 256;  // shorter rows of pixels are joined
  constexpr int64_t kMaxBlocks = 64;
  constexpr int64_t kBlockElements = 32768;
  constexpr int64_t kPartials = int64_t{1} << 21;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  GroupNormPlan plan;
  plan.D = shape.C / shape.G;
  plan.M = plan.D * shape.HxW;
  plan.units = shape.N;
  plan.width = shape.C;
  if (shape.HxW == 1 || (shape.layout == Layout::channels_first && shape.HxW < kShortPlane)) {
    plan.kind = GroupNormPlan::rows;
    plan.width = shape.C * shape.HxW;
  } else if (shape.layout == Layout::channels_first) {
    plan.kind = GroupNormPlan::planes;
    plan.units = shape.N * shape.G;
    plan.chunk_elements = kChunkElements;
    plan.chunks = ceil_div(plan.M, kChunkElements);
  } else {
    plan.kind = GroupNormPlan::pixels;
    if (shape.C < kMinWidth) {
      plan.repeat = std::clamp(shape.HxW / 8, int64_t{1}, ceil_div(kMinWidth, shape.C));
      // whole cache lines, where it takes no more than a few pixels
      for (int64_t r = plan.repeat; r < 2 * plan.repeat && r <= shape.HxW / 8; ++r) {
        if (r * shape.C % 32 == 0) {
          plan.repeat = r;
          break;
        }
      }
    }
    plan.width = plan.repeat * shape.C;
    plan.steps = ceil_div(shape.HxW, plan.repeat);
    plan.tail = shape.HxW % plan.repeat * shape.C;
    plan.chunk_rows = std::max(ceil_div(kChunkElements, plan.width), int64_t{64});
    plan.chunks = ceil_div(plan.steps, plan.chunk_rows);
  }
  const int64_t per_sample = shape.C * shape.HxW;
  plan.blocks = std::min({shape.N, kMaxBlocks, ceil_div(shape.N * per_sample, kBlockElements),
                          std::max(kPartials / shape.C, int64_t{1})});
  if (plan.kind == GroupNormPlan::rows) {
    // The sums of a block, 32 bytes a channel, should cost little beside its samples.
    plan.blocks = std::min(plan.blocks, std::max(shape.N / 16, std::min(shape.N, int64_t{8})));
  }
  plan.block_samples = ceil_div(shape.N, plan.blocks);
  plan.blocks = ceil_div(shape.N, plan.block_samples);
  return plan;
}

// Planes: where chunk i of a group begins, in values from the group's first. Within a plane at a
// whole number of cache lines and of mask bytes.
inline int64_t begin_of_chunk(const GroupNormPlan& plan, int64_t HxW, int64_t chunk) {
  if (chunk >= plan.chunks) return plan.M;
  const int64_t at = chunk * plan.chunk_elements;
  return at - at % HxW % 64;
}

}  // namespace batchops
