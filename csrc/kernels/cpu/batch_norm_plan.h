// How the CPU batch norm cuts a tensor. Everything here depends on the shape only, never on the
// number of threads, so that the same sums are formed in the same order on any machine.
#pragma once
#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cpu/norm_plan.h"

namespace batchops {

// Two kernels share one vocabulary: a tensor is a grid of groups (of channels) × steps, and
// chunk i of a group is steps [i · steps_per_chunk, (i + 1) · steps_per_chunk).
//
// Planes (channels_first, large HxW). A group is one channel, a step one piece of one plane:
//
//     plane (n, c):  |--- piece ---|--- piece ---|- rest -|        steps = N · pieces_per_plane
//
// Rows (channels_last, and channels_first with small HxW). A step is one row of memory, a group a
// stretch of `width` columns of it. Statistics are first kept for each column, in L1:
//
//     channels_last    row = `repeat` pixels of C channels; column j belongs to channel j % C
//     channels_first   row = one sample; column j belongs to channel j / HxW
//
// `repeat` makes rows of few channels long enough to vectorise, and odd ones a whole number of
// cache lines. The pixels left over form one short last row of `tail` columns.
struct BatchNormPlan {
  bool by_rows = false;
  int64_t groups = 1;
  int64_t group_channels = 1;  // the last group may have fewer
  int64_t steps = 0;
  int64_t steps_per_chunk = 1;
  int64_t chunks = 1;

  int64_t piece = 0;
  int64_t pieces_per_plane = 1;

  int64_t row_stride = 0;
  int64_t width = 0;
  int64_t repeat = 1;   // pixels a row (channels_last), 1 otherwise
  int64_t segment = 1;  // columns a channel (channels_first), 1 otherwise
  int64_t tail = 0;
};

// Widest group of columns: what the kernel keeps for each column must stay in L1 and on the stack.
constexpr int64_t kMaxWidth = 2048;

BatchNormPlan plan_batch_norm(const BatchNormShape& shape);

// Values of one channel in the steps before `step`.
inline int64_t values_before(const BatchNormPlan& plan, const BatchNormShape& shape, int64_t step) {
  if (plan.by_rows) {
    const int64_t full = plan.steps - (plan.tail > 0);
    if (step <= full) return step * plan.repeat * plan.segment;
    return full * plan.repeat + plan.tail / shape.C;
  }
  const int64_t rest = step % plan.pieces_per_plane * plan.piece;
  return step / plan.pieces_per_plane * shape.HxW + (rest < shape.HxW ? rest : shape.HxW);
}

}  // namespace batchops
