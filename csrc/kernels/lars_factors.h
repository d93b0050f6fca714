// What LARS' kernels make of a group's hyperparameters, a tensor's norms and the clip.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "kernels/lars.h"
#include "kernels/optimizer_factors.h"

namespace batchops {

// Sums over a tensor, of the scaled gradient: see GradDivisor.
struct LarsNorms {
  double p_sq = 0;  // Σ p²
  double g_sq = 0;  // Σ g²
  double u_sq = 0;  // Σ (g + decay·p)², decay in the same scale

  BATCHOPS_HOST_DEVICE void operator+=(const LarsNorms& other) {
    p_sq += other.p_sq;
    g_sq += other.g_sq;
    u_sq += other.u_sq;
  }
};

// Factors of the elementwise formulas: m = momentum·m + k_g·g + k_p·p, p += p_g·g + p_p·p + p_m·m.
struct LarsFactors {
  float g_scale;  // ±2^-e
  float momentum[2], k_g[2], k_p[2];
  float p_g[2], p_p[2], p_m[2];
};

struct LarsOutcome {
  TensorStats stats;
  LarsFactors factors;
  double g_scale, k_g, p_g;  // before they are rounded and split

  LarsOutcome() = default;
  BATCHOPS_HOST_DEVICE LarsOutcome(const LarsGroup& o, const OptimizerTensor& x,
                                   const LarsNorms& norms, double C, double grad_scale) {
    const GradDivisor divisor(C);
    const double sign = o.maximize ? -1 : 1;
    double decay = o.decay_of(x.excluded != 0);
    const double p_norm = sqrt(norms.p_sq);
    const double g_norm = sqrt(norms.g_sq) / divisor.c;
    double u_norm = sqrt(norms.u_sq) / divisor.c;
    double ratio = 1;
    if (o.adapted() && !x.excluded) {
      const bool zero = p_norm == 0 || g_norm == 0;
      if (zero && o.zero_norm_plain) {
        decay = 0;
        u_norm = g_norm;
      } else {
        if (!zero) ratio = o.trust_coeff * p_norm / (g_norm + decay * p_norm + o.eps);
        if (o.trust_clip) {
          ratio /= o.lr;
          if (ratio > 1) ratio = 1;
        }
      }
    }
    stats = {static_cast<float>(p_norm),
             static_cast<float>(sqrt(norms.g_sq) / divisor.inverse / grad_scale),
             static_cast<float>(u_norm), static_cast<float>(ratio)};

    const bool first = x.step == 1;
    const double inside = o.lr_in_momentum ? o.lr : 1;
    const double outside = o.lr_in_momentum ? 1 : o.lr;
    const double g_to = inside * ratio / divisor.c;  // of g in G
    const double p_to = inside * ratio * decay;      // of p in G
    const double weight = first ? 1 : 1 - o.dampening;
    const bool direct = o.momentum == 0 || o.nesterov;  // G goes to p itself
    g_scale = sign * divisor.inverse;
    k_g = weight * g_to;
    p_g = direct ? -outside * g_to : 0;
    set_gradient_factors();
    split_factor(factors.momentum, first ? 0 : o.momentum * o.momentum_factor);
    split_factor(factors.k_p, weight * p_to);
    split_factor(factors.p_p, direct ? -outside * p_to : 0);
    split_factor(factors.p_m, o.momentum == 0 ? 0 : o.nesterov ? -outside * o.momentum : -outside);
  }

  // The norm of a gradient near an end of float's range makes a λ_l that is outside of it, though
  // λ_l·g is not: a power of two goes from the gradient's factors to its scale, which changes no
  // other result. For who scales the gradient anew after the first sweep.
  void keep_in_range() {
    constexpr int kNear = 64;
    int of_factor, of_scale;
    const double factor = k_g != 0 ? k_g : p_g;
    if (!(std::isfinite(factor) && std::isfinite(g_scale)) || factor == 0 || g_scale == 0) return;
    std::frexp(factor, &of_factor);
    std::frexp(g_scale, &of_scale);
    if (std::abs(of_factor) <= kNear) return;
    int shift = of_factor > 0 ? of_factor - kNear : of_factor + kNear;
    // The scale stays a float, and a normal one.
    shift = std::min(std::max(shift, -120 - of_scale), 120 - of_scale);
    g_scale = std::ldexp(g_scale, shift);
    k_g = std::ldexp(k_g, -shift);
    p_g = std::ldexp(p_g, -shift);
    set_gradient_factors();
  }

 private:
  BATCHOPS_HOST_DEVICE void set_gradient_factors() {
    factors.g_scale = static_cast<float>(g_scale);
    split_factor(factors.k_g, k_g);
    split_factor(factors.p_g, p_g);
  }
};

}  // namespace batchops
