// What the optimizers' kernels make of the numbers of a step, on both devices.
#pragma once
#include <cmath>
#include <vector>

#include "kernels/multi_tensor.h"

#ifdef __CUDACC__
#define BATCHOPS_HOST_DEVICE __host__ __device__
#else
#define BATCHOPS_HOST_DEVICE
#endif

namespace batchops {

// Factors that a kernel needs to more places than a float has, as the sum of two.
BATCHOPS_HOST_DEVICE inline void split_factor(float (&out)[2], double value) {
  out[0] = static_cast<float>(value);
  out[1] = static_cast<float>(value - out[0]);
  // Beyond float's range there is no low part: inf - inf would make a NaN of an infinity.
  if (!(out[0] - out[0] == 0)) out[1] = 0;
}

// A divisor as 2^e·c with 1 <= c < 2: g is scaled by 2^-e, which is exact, and c goes into the
// factors. An infinite one makes 0 of every finite gradient and NaN of the others; NaN makes NaN of
// all.
struct GradDivisor {
  double inverse;  // 2^-e
  double c = 1;

  GradDivisor() = default;
  BATCHOPS_HOST_DEVICE explicit GradDivisor(double C) {
    int exponent = 0;
    const bool finite = C > 0 && C <= 1.7976931348623157e308;  // false for NaN
    if (finite) {
      c = 2 * frexp(C, &exponent);
      exponent -= 1;
    }
    inverse = finite ? ldexp(1.0, -exponent) : 1 / C;
  }
};

// What the gradients are divided by. Not hidden where it is NaN.
BATCHOPS_HOST_DEVICE inline double grad_divisor(double grad_sum_sq, double max_grad_norm,
                                                double clip_eps, double grad_scale) {
  const double excess = (sqrt(grad_sum_sq) / grad_scale + clip_eps) / max_grad_norm;
  return excess <= 1 ? grad_scale : excess * grad_scale;
}

// The set of every tensor, by index into `sets`, and the sets: make(tensor) for each distinct
// (group, excluded, step). Neighbours mostly share all three, so that there are few.
template <class Set, class Make>
std::vector<int32_t> optimizer_sets(const OptimizerTensor* tensors, int64_t tensor_count,
                                    int32_t group_count, std::vector<Set>& sets, Make&& make) {
  std::vector<int32_t> set_of(tensor_count);
  std::vector<int32_t> latest(2 * group_count, -1);  // the set last made for a group
  std::vector<double> latest_step(2 * group_count, 0);
  for (int64_t i = 0; i < tensor_count; ++i) {
    const OptimizerTensor& x = tensors[i];
    const int32_t key = 2 * x.group + (x.excluded != 0);
    if (latest[key] < 0 || latest_step[key] != x.step) {
      latest[key] = static_cast<int32_t>(sets.size());
      latest_step[key] = x.step;
      sets.push_back(make(x));
    }
    set_of[i] = latest[key];
  }
  return set_of;
}

}  // namespace batchops
