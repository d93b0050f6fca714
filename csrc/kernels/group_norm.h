// Group norm with activation and residual, forward and backward, on CPU and CUDA. Layer norm and
// instance norm are its limits.
//
// A group is one sample's channels [g · C/G, (g + 1) · C/G) with all their positions; M = C/G ·
// HxW.
//
//   mean_ng = Σ x / M,  var_ng = Σ (x - mean_ng)² / M,  rstd_ng = 1 / sqrt(var_ng + eps)
//   z = (x - mean_ng) · rstd_ng · weight_c + bias_c + residual
//   y = activation(z)
//
// and for the gradient dy of y, with dz = dy · activation'(z) and x̂ = (x - mean) · rstd:
//
//   dbias_c = Σ_n dz,   dweight_c = Σ_n dz · x̂,   dresidual = dz
//   dx = rstd_ng · (weight_c · dz - A_ng / M - x̂ · B_ng / M),
//        A_ng = Σ weight · dz,   B_ng = Σ weight · dz · x̂   over the group
//
//   layer norm over the last D values of (rows, D):  N = rows, C = D, HxW = 1, G = 1
//   instance norm:                                   G = C
#pragma once
#include <cstddef>

#include "kernels/common.h"

namespace batchops {

// `stats`, as batch norm's, for each (n, g): three rows of N · G values,
//   stats[0] = mean rounded, stats[1] = mean - stats[0] (its low part), stats[2] = rstd,
// in float for f32/f16/bf16 inputs and in double for f64.
//
// `mask`, as batch norm's: one bit an element where residual is given and the activation is
// maskable, rows padded to whole bytes:
//   channels_first: [N * C, ceil(HxW / 8)]     channels_last: [N * HxW, ceil(C / 8)]
struct GroupNormShape {
  int64_t N = 0;
  int64_t C = 0;
  int64_t HxW = 0;
  int64_t G = 1;                           // divides C
  Layout layout = Layout::channels_first;  // HxW = 1 is both; channels_last is expected then
  DType dtype = DType::f32;                // x, residual, y, dy, dx, dresidual
  DType param_dtype = DType::f32;          // weight, bias, dweight, dbias
  Activation activation = Activation::none;
  double slope = 0.01;  // leaky_relu's

  int64_t numel() const { return N * C * HxW; }
  int64_t mask_bytes() const {
    return layout == Layout::channels_first ? N * C * ((HxW + 7) / 8) : N * HxW * ((C + 7) / 8);
  }
};

struct GroupNormForward {
  GroupNormShape shape;
  const void* x = nullptr;
  const void* residual = nullptr;  // may be null
  const void* weight = nullptr;    // [C]; may be null: 1
  const void* bias = nullptr;      // [C]; may be null: 0
  void* y = nullptr;
  void* stats = nullptr;    // [3, N * G], written unless have_stats
  uint8_t* mask = nullptr;  // may be null: not wanted
  // `stats` is what an earlier call wrote for the same x: it is read, and y alone (and the mask)
  // comes out, bit for bit as it did then.
  bool have_stats = false;
  double eps = 1e-5;
};

struct GroupNormBackward {
  GroupNormShape shape;
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* residual = nullptr;  // read to recompute z where no mask can stand for it
  const void* weight = nullptr;    // may be null
  const void* bias = nullptr;      // may be null; read only to recompute z
  const void* stats = nullptr;     // [3, N * G] from the forward
  const uint8_t* mask = nullptr;   // given exactly when the forward wrote one
  void* dx = nullptr;              // each output may be null: not wanted
  void* dresidual = nullptr;       // only with an activation; without one it equals dy
  void* dweight = nullptr;
  void* dbias = nullptr;
};

// All entry points: sizes may be 0 only if numel() is 0, and then nothing is written. Pointers need
// only the alignment of their element. Returns null, or a message that says what went wrong.

BATCHOPS_API const char* group_norm_forward_cpu(const GroupNormForward& args, const Parallel& par);
BATCHOPS_API const char* group_norm_backward_cpu(const GroupNormBackward& args,
                                                 const Parallel& par);

// The workspace and the device: as batch norm's.
BATCHOPS_API size_t group_norm_forward_workspace_cuda(const GroupNormForward& args, int device);
BATCHOPS_API size_t group_norm_backward_workspace_cuda(const GroupNormBackward& args, int device);
BATCHOPS_API const char* group_norm_forward_cuda(const GroupNormForward& args, void* workspace,
                                                 int device, void* stream);
BATCHOPS_API const char* group_norm_backward_cuda(const GroupNormBackward& args, void* workspace,
                                                  int device, void* stream);

}  // namespace batchops
