// Batch norm with activation and residual, forward and backward, on CPU and CUDA.
//
//   mean_c = Σ x / M,  var_c = Σ (x - mean_c)² / M,  rstd_c = 1 / sqrt(var_c + eps),  M = N · HxW
//   z = (x - mean_c) · rstd_c · weight_c + bias_c + residual
//   y = activation(z)
//
// and for the gradient dy of y, with dz = dy · activation'(z) and x̂ = (x - mean) · rstd:
//
//   dbias_c = Σ dz,   dweight_c = Σ dz · x̂,   dresidual = dz
//   training:  dx = weight_c · rstd_c · (dz - dbias_c / M - x̂ · dweight_c / M)
//   eval:      dx = weight_c · rstd_c · dz
//
// Ghost batches: training statistics over `ghost` samples each instead of all N. The means and
// variances above, and dbias and dweight inside dx, are then those of the ghost batch that a sample
// belongs to, M its number of values; the outputs dbias and dweight are sums over all samples.
#pragma once
#include <cstddef>

#include "kernels/common.h"

namespace batchops {

// `stats` carries what the backward needs of the statistics: three rows of ghosts · C values, for
// ghost batch k and channel c in column k · C + c,
//   stats[0] = mean rounded, stats[1] = mean - stats[0] (its low part), stats[2] = rstd,
// in float for f32/f16/bf16 inputs and in double for f64. The low part matters: at |mean|/std = 1e4
// a mean rounded to float puts x̂ off by 4.8e-4.
//
// `mask` holds one bit an element: 1 where activation'(z) = 1. It is written when residual is given
// and the derivative takes one other value only (relu, leaky_relu), because z cannot be recomputed
// from x alone there. Rows are padded to whole bytes so that no two rows share one:
//   channels_first: [N * C, ceil(HxW / 8)]     channels_last: [N * HxW, ceil(C / 8)]
// bit i % 8 of byte i / 8 (lowest bit first) belongs to element i of the row.
struct BatchNormShape {
  int64_t N = 0;
  int64_t C = 0;
  int64_t HxW = 0;
  Layout layout = Layout::channels_first;
  DType dtype = DType::f32;        // x, residual, y, dy, dx, dresidual
  DType param_dtype = DType::f32;  // weight, bias, dweight, dbias
  DType running_dtype = DType::f32;
  Activation activation = Activation::none;
  double slope = 0.01;  // leaky_relu's
  // Samples that share statistics; 0, or N and more: all. The last ghost batch takes what is left
  // over, and a single value left over joins the ghost batch before it.
  int64_t ghost = 0;

  int64_t numel() const { return N * C * HxW; }
  int64_t ghosts() const {
    if (ghost <= 0 || ghost >= N) return 1;
    const int64_t full = N / ghost, left = N % ghost;
    return full + (left * HxW > 1);
  }
  // Ghost batch k is samples [first_sample(k), first_sample(k + 1)).
  int64_t first_sample(int64_t k) const { return k < ghosts() ? k * ghost : N; }
  int64_t mask_bytes() const {
    return layout == Layout::channels_first ? N * C * ((HxW + 7) / 8) : N * HxW * ((C + 7) / 8);
  }
};

struct BatchNormForward {
  BatchNormShape shape;
  const void* x = nullptr;
  const void* residual = nullptr;  // may be null
  const void* weight = nullptr;    // may be null: 1
  const void* bias = nullptr;      // may be null: 0
  void* y = nullptr;
  void* stats = nullptr;    // [3, ghosts · C], written unless have_stats
  uint8_t* mask = nullptr;  // may be null: not wanted
  // `stats` is what an earlier call wrote for the same x: it is read, and y alone (and the mask)
  // comes out, bit for bit as it did then. The running statistics are left alone.
  bool have_stats = false;
  // Training: null, or updated as running += momentum · (batch - running), with the mean and the
  // unbiased variance of all N samples, ghost batches pooled. Eval: the statistics to normalise
  // with (required).
  void* running_mean = nullptr;
  void* running_var = nullptr;
  bool training = true;
  double momentum = 0.1;
  double eps = 1e-5;
};

struct BatchNormBackward {
  BatchNormShape shape;
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* residual = nullptr;  // read to recompute z where no mask can stand for it
  const void* weight = nullptr;    // may be null
  const void* bias = nullptr;      // may be null; read only to recompute z for the activation
  const void* stats = nullptr;     // [3, ghosts · C] from the forward
  const uint8_t* mask =
      nullptr;                // given exactly when the forward wrote one; then z is not recomputed
  void* dx = nullptr;         // each output may be null: not wanted
  void* dresidual = nullptr;  // only with an activation; without one it equals dy
  void* dweight = nullptr;
  void* dbias = nullptr;
  bool training = true;
};

// All entry points: sizes may be 0 only if numel() is 0, and then nothing is written. Pointers need
// only the alignment of their element. Returns null, or a message that says what went wrong.

BATCHOPS_API const char* batch_norm_forward_cpu(const BatchNormForward& args, const Parallel& par);
BATCHOPS_API const char* batch_norm_backward_cpu(const BatchNormBackward& args,
                                                 const Parallel& par);

// The workspace belongs to the call (with these arguments): any content, 16-byte aligned, at least
// this many bytes, on the device; it may be freed in stream order as soon as the call returns. The
// current device must be `device` already in the framework's eyes; it is set again for the
// statically linked runtime.
BATCHOPS_API size_t batch_norm_forward_workspace_cuda(const BatchNormForward& args, int device);
BATCHOPS_API size_t batch_norm_backward_workspace_cuda(const BatchNormBackward& args, int device);
BATCHOPS_API const char* batch_norm_forward_cuda(const BatchNormForward& args, void* workspace,
                                                 int device, void* stream);
BATCHOPS_API const char* batch_norm_backward_cuda(const BatchNormBackward& args, void* workspace,
                                                  int device, void* stream);

}  // namespace batchops
