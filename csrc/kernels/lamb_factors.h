// What LAMB's kernels make of a group's hyperparameters, a step count and the clip.
#pragma once
#include "kernels/lamb.h"
#include "kernels/optimizer_factors.h"

namespace batchops {

// What a group and a step count come to, before the clip is known.
struct LambSet {
  double beta1, beta2, beta3;
  double eps_root;      // eps·b, with b = sqrt(bc2); 0 where eps is inside the root
  double eps_inside;    // eps·bc2 there, else 0
  double scale;         // b / bc1
  double weight_decay;  // λ in u
  double decay;         // p·decay goes off p whatever u is (decoupled_decay)
  double lr;
  double ratio_min, ratio_max;
  int32_t adapted, caution, maximize;

  LambSet() = default;
  BATCHOPS_HOST_DEVICE LambSet(const LambGroup& group, double step, bool excluded) {
    double bc1 = group.bias_correction ? 1 - pow(group.beta1, step) : 1;
    double bc2 = group.bias_correction ? 1 - pow(group.beta2, step) : 1;
    lr = group.lr;
    if (group.step_size_correction) {
      lr *= sqrt(bc2) / bc1;
      bc1 = bc2 = 1;
    }
    beta1 = group.beta1;
    beta2 = group.beta2;
    beta3 = group.grad_averaging ? 1 - group.beta1 : 1;
    eps_root = group.eps_inside_sqrt ? 0 : group.eps * sqrt(bc2);
    eps_inside = group.eps_inside_sqrt ? group.eps * bc2 : 0;
    scale = sqrt(bc2) / bc1;
    weight_decay = group.decoupled_decay ? 0 : group.weight_decay;
    decay = group.decoupled_decay ? group.decay_lr * group.weight_decay : 0;
    ratio_min = group.ratio_min;
    ratio_max = group.ratio_max;
    adapted = group.adapted() && !excluded;
    caution = group.caution;
    maximize = group.maximize;
  }
};

inline std::vector<int32_t> lamb_sets(const LambArgs& args, std::vector<LambSet>& sets) {
  return optimizer_sets(args.tensors, args.tensor_count, args.group_count, sets,
                        [&](const OptimizerTensor& x) {
                          return LambSet(args.groups[x.group], x.step, x.excluded != 0);
                        });
}

// The factors of the elementwise formulas. With C = 2^e·c the clip costs no rounding, and g² cannot
// overflow. With b = sqrt(bc2),
//   u = (b / bc1)·(m / (sqrt(v) + eps·b)) + λ·p
// so that an element takes one square root and one division. Factors are held as a sum of two
// floats where a rounded one would cost a good part of the result's last place.
struct LambFactors {
  float g_scale;          // ±2^-e
  float beta1[2], k1[2];  // k1 = β3 / c
  float beta2[2], k2[2];  // k2 = (1 - β2) / c²
  float eps[2];           // eps·b
  float eps_inside[2];
  float weight_decay[2];  // λ / scale: the norms are taken of u / scale

  LambFactors() = default;
  BATCHOPS_HOST_DEVICE LambFactors(const LambSet& set, double C) {
    const GradDivisor divisor(C);
    g_scale = static_cast<float>(set.maximize ? -divisor.inverse : divisor.inverse);
    split_factor(beta1, set.beta1);
    split_factor(k1, set.beta3 / divisor.c);
    split_factor(beta2, set.beta2);
    split_factor(k2, (1 - set.beta2) / (divisor.c * divisor.c));
    split_factor(eps, set.eps_root);
    split_factor(eps_inside, set.eps_inside);
    split_factor(weight_decay, set.weight_decay / set.scale);
  }
};

// The factors of the update, once the ratio is known: p = keep·p - step·(m / (sqrt(v) + eps·b)).
struct LambStepFactors {
  float step[2];  // lr·r·scale, and what caution makes of it
  float keep[2];  // 1 - lr·r·λ, or less the decoupled decay

  LambStepFactors() = default;
  BATCHOPS_HOST_DEVICE LambStepFactors(const LambSet& set, double ratio, double boost) {
    split_factor(step, set.lr * ratio * set.scale * boost);
    split_factor(keep, 1 - (set.lr * ratio * set.weight_decay + set.decay));
  }
};

// Sums over a tensor, in units of the scaled gradient and of u / scale. With caution u_sq is of the
// elements that are kept, without λ·p; `cross` and `kept` are 0 without it.
struct LambNorms {
  double p_sq = 0;   // Σ p²
  double g_sq = 0;   // Σ g²
  double u_sq = 0;   // Σ (u / scale)²
  double cross = 0;  // Σ (a / scale)·p
  double kept = 0;   // Σ [m·g > 0]

  BATCHOPS_HOST_DEVICE void operator+=(const LambNorms& other) {
    p_sq += other.p_sq;
    g_sq += other.g_sq;
    u_sq += other.u_sq;
    cross += other.cross;
    kept += other.kept;
  }
};

// What a tensor's sums come to.
struct LambOutcome {
  TensorStats stats;
  LambStepFactors step;

  LambOutcome() = default;
  BATCHOPS_HOST_DEVICE LambOutcome(const LambSet& set, const LambNorms& norms, int64_t numel,
                                   double C, double grad_scale) {
    double boost = 1, u_sq = norms.u_sq;
    if (set.caution) {
      const double mean = norms.kept / static_cast<double>(numel);
      boost = 1 / (mean >= 1e-3 ? mean : 1e-3);  // of no elements, the mean is NaN
      const double decay = set.weight_decay / set.scale;
      u_sq = boost * boost * u_sq + 2 * boost * decay * norms.cross + decay * decay * norms.p_sq;
      if (u_sq < 0) u_sq = 0;
    }
    const double keep = 1 - set.decay;
    const double p_norm = sqrt(norms.p_sq) * (keep < 0 ? -keep : keep);
    const double u_norm = sqrt(u_sq) * set.scale;
    double ratio = 1;
    if (set.adapted && p_norm != 0 && u_norm != 0) {
      ratio = p_norm / u_norm;
      // A NaN passes both.
      if (ratio < set.ratio_min) ratio = set.ratio_min;
      if (ratio > set.ratio_max) ratio = set.ratio_max;
    }
    const double g_norm = sqrt(norms.g_sq) / GradDivisor(C).inverse / grad_scale;
    stats = {static_cast<float>(sqrt(norms.p_sq)), static_cast<float>(g_norm),
             static_cast<float>(u_norm), static_cast<float>(ratio)};
    step = LambStepFactors(set, ratio, boost);
  }
};

}  // namespace batchops
