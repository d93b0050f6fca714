// What the kernels make of a group's hyperparameters, a step count and the clip.
#pragma once
#include <cmath>
#include <vector>

#include "kernels/lamb.h"

#ifdef __CUDACC__
#define BATCHOPS_HOST_DEVICE __host__ __device__
#else
#define BATCHOPS_HOST_DEVICE
#endif

namespace batchops {

// What a group and a step count come to, before the clip is known.
struct LambSet {
  double beta1, beta2, beta3;
  double eps_root;      // eps·b, with b = sqrt(bc2)
  double scale;         // b / bc1
  double weight_decay;  // λ
  double lr;
  int32_t adapted, trust_clip, maximize;

  LambSet() = default;
  LambSet(const LambGroup& group, double step) {
    const double bc1 = group.bias_correction ? 1 - std::pow(group.beta1, step) : 1;
    const double bc2 = group.bias_correction ? 1 - std::pow(group.beta2, step) : 1;
    beta1 = group.beta1;
    beta2 = group.beta2;
    beta3 = group.grad_averaging ? 1 - group.beta1 : 1;
    eps_root = group.eps * std::sqrt(bc2);
    scale = std::sqrt(bc2) / bc1;
    weight_decay = group.weight_decay;
    lr = group.lr;
    adapted = group.adapted();
    trust_clip = group.trust_clip;
    maximize = group.maximize;
  }
};

// The set of every tensor, by index into `sets`, and the sets. Neighbours mostly share group and
// step, so that there are few.
inline std::vector<int32_t> lamb_sets(const LambArgs& args, std::vector<LambSet>& sets) {
  std::vector<int32_t> set_of(args.tensor_count);
  std::vector<int32_t> latest(args.group_count, -1);  // the set last made for a group
  std::vector<double> latest_step(args.group_count, 0);
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    const LambTensor& x = args.tensors[i];
    if (latest[x.group] < 0 || latest_step[x.group] != x.step) {
      latest[x.group] = static_cast<int32_t>(sets.size());
      latest_step[x.group] = x.step;
      sets.emplace_back(args.groups[x.group], x.step);
    }
    set_of[i] = latest[x.group];
  }
  return set_of;
}

// The factors of the elementwise formulas. With C = 2^e·c, 1 <= c < 2, g is scaled by 2^-e, which
// is exact, and c goes into the factors: so the clip costs no rounding, and g² cannot overflow.
// With b = sqrt(bc2),
//   u = (b / bc1)·(m / (sqrt(v) + eps·b)) + λ·p
// so that an element takes one square root and one division. Factors are held as a sum of two
// floats where a rounded one would cost a good part of the result's last place.
struct LambFactors {
  float g_scale;          // ±2^-e
  float beta1[2], k1[2];  // k1 = β3 / c
  float beta2[2], k2[2];  // k2 = (1 - β2) / c²
  float eps[2];           // eps·b
  float weight_decay;     // λ / scale: the norms are taken of u / scale

  LambFactors() = default;
  BATCHOPS_HOST_DEVICE LambFactors(const LambSet& set, double C) {
    int exponent = 0;
    double c = 1;
    const bool finite = C <= 1.7976931348623157e308;  // false for NaN
    if (finite) {
      c = 2 * frexp(C, &exponent);
      exponent -= 1;
    }
    // An infinite C makes 0 of every finite gradient and NaN of the others; NaN makes NaN of all.
    const double scaled = finite ? ldexp(1.0, -exponent) : 1 / C;
    g_scale = static_cast<float>(set.maximize ? -scaled : scaled);
    split(beta1, set.beta1);
    split(k1, set.beta3 / c);
    split(beta2, set.beta2);
    split(k2, (1 - set.beta2) / (c * c));
    split(eps, set.eps_root);
    weight_decay = static_cast<float>(set.weight_decay / set.scale);
  }

  BATCHOPS_HOST_DEVICE static void split(float (&out)[2], double value) {
    out[0] = static_cast<float>(value);
    out[1] = static_cast<float>(value - out[0]);
    // Beyond float's range there is no low part: inf - inf would make a NaN of an infinity.
    if (!(out[0] - out[0] == 0)) out[1] = 0;
  }
};

// The factors of the update, once the ratio is known: p -= step·(u / scale).
struct LambStepFactors {
  float step[2];  // lr·r·scale
  float decay;    // lr·r·λ, which multiplies p

  LambStepFactors() = default;
  BATCHOPS_HOST_DEVICE LambStepFactors(const LambSet& set, double ratio) {
    LambFactors::split(step, set.lr * ratio * set.scale);
    decay = static_cast<float>(set.lr * ratio * set.weight_decay);
  }
};

// C of Σ grad². Not hidden where it is NaN.
BATCHOPS_HOST_DEVICE inline double lamb_clip(double grad_sum_sq, double max_grad_norm) {
  const double excess = sqrt(grad_sum_sq) / max_grad_norm;
  return excess <= 1 ? 1 : excess;
}

// r of Σ p² and Σ (u / scale)². Not hidden where it is NaN.
BATCHOPS_HOST_DEVICE inline double lamb_ratio(const LambSet& set, double p_sq, double u_sq) {
  const double p_norm = sqrt(p_sq);
  const double u_norm = sqrt(u_sq) * set.scale;
  const double ratio = p_norm == 0 || u_norm == 0 ? 1 : p_norm / u_norm;
  return set.trust_clip && ratio > 1 ? 1 : ratio;
}

}  // namespace batchops
