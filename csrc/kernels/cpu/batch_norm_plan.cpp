#include "kernels/cpu/batch_norm_plan.h"

#include <algorithm>
#include <numeric>

namespace batchops {
namespace {

constexpr int64_t kMinWidth = 256;    // shorter rows are repeated
constexpr int64_t kPlaneWidth = 768;  // channels_first: columns gathered into a group
constexpr int64_t kPlanesFrom = 256;  // HxW from which the plane kernel is the faster
constexpr int64_t kChunkElements = 32768;
constexpr int64_t kMaxChunks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row is aligned when it is a multiple of so many elements.
int64_t line_of(const BatchNormShape& shape) { return 64 / size_of(shape.dtype); }

void cut_into_chunks(BatchNormPlan& plan, int64_t step_elements, int64_t least_steps) {
  plan.steps_per_chunk = std::max({ceil_div(kChunkElements, step_elements), least_steps,
                                   ceil_div(plan.steps, kMaxChunks), int64_t{1}});
  plan.chunks = ceil_div(plan.steps, plan.steps_per_chunk);
}

BatchNormPlan planes(const BatchNormShape& shape) {
  BatchNormPlan plan;
  plan.groups = shape.C;
  plan.pieces_per_plane = ceil_div(shape.HxW, kPieceElements);
  // Even pieces, each a whole number of cache lines and of mask bytes.
  plan.piece = ceil_div(ceil_div(shape.HxW, plan.pieces_per_plane), 64) * 64;
  plan.pieces_per_plane = ceil_div(shape.HxW, plan.piece);
  plan.steps = shape.N * plan.pieces_per_plane;
  cut_into_chunks(plan, std::min(plan.piece, shape.HxW), 1);
  return plan;
}

BatchNormPlan samples(const BatchNormShape& shape) {
  BatchNormPlan plan;
  plan.by_rows = true;
  plan.segment = shape.HxW;
  plan.row_stride = shape.C * shape.HxW;
  plan.steps = shape.N;
  const int64_t line = line_of(shape);
  int64_t channels = line / std::gcd(shape.HxW, line);
  if (channels * shape.HxW > kMaxWidth) channels = 1;
  while (channels * shape.HxW < kPlaneWidth) channels *= 2;
  while (channels * shape.HxW > kMaxWidth) channels /= 2;
  plan.group_channels = std::min(channels, shape.C);
  plan.groups = ceil_div(shape.C, plan.group_channels);
  plan.width = plan.group_channels * shape.HxW;
  cut_into_chunks(plan, plan.width, kRowsPerFlush);
  return plan;
}

BatchNormPlan pixels(const BatchNormShape& shape) {
  BatchNormPlan plan;
  plan.by_rows = true;
  const int64_t C = shape.C, count = shape.N * shape.HxW;
  const int64_t line = line_of(shape), aligned = line / std::gcd(C, line);
  const int64_t wanted = ceil_div(ceil_div(kMinWidth, C), aligned) * aligned;
  if (wanted * C <= kMaxWidth && count >= 8 * wanted) {
    plan.repeat = wanted;
  } else if (C < kMinWidth) {
    plan.repeat = std::clamp(count / 8, int64_t{1}, kMinWidth / C);
  }
  plan.row_stride = plan.repeat * C;
  plan.width = std::min(plan.row_stride, kMaxWidth);
  plan.groups = ceil_div(plan.row_stride, plan.width);
  plan.group_channels = plan.repeat > 1 ? C : plan.width;
  plan.tail = count % plan.repeat * C;
  plan.steps = ceil_div(count, plan.repeat);
  cut_into_chunks(plan, plan.width, kRowsPerFlush);
  return plan;
}

}  // namespace

BatchNormPlan plan_batch_norm(const BatchNormShape& shape) {
  // (N, C) is both layouts at once.
  if (shape.layout == Layout::channels_last || shape.HxW == 1) return pixels(shape);
  return shape.HxW >= kPlanesFrom ? planes(shape) : samples(shape);
}

}  // namespace batchops
