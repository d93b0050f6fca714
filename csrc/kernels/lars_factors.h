// What LARS' kernels make of a group's hyperparameters, a tensor's norms and the clip.
#pragma once
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
  // λ_l·g is not: a power of two, which is returned, goes from the gradient's factors to its scale
  // and changes no other result. For who scales the gradient anew after the first sweep.
  BATCHOPS_HOST_DEVICE double keep_in_range() {
    constexpr int kNear = 64, kMost = 120;
    const auto is_number = [](double x) { return x - x == 0 && x != 0; };
    const double factor = k_g != 0 ? k_g : p_g;
    if (!is_number(factor) || !is_number(g_scale)) return 1;
    int of_factor, of_scale;
    frexp(factor, &of_factor);
    frexp(g_scale, &of_scale);
    // The scale stays a float, and a normal one, and so does the power.
    const int shift = within(beyond(of_factor, kNear), within(-kMost - of_scale, -kMost, 0),
                             within(kMost - of_scale, 0, kMost));
    const double power = ldexp(1.0, shift);
    g_scale *= power;
    k_g /= power;
    p_g /= power;
    set_gradient_factors();
    return power;
  }

 private:
  BATCHOPS_HOST_DEVICE static int within(int i, int least, int most) {
    return i < least ? least : i > most ? most : i;
  }
  // By how much i is outside of ±bound.
  BATCHOPS_HOST_DEVICE static int beyond(int i, int bound) { return i - within(i, -bound, bound); }

  BATCHOPS_HOST_DEVICE void set_gradient_factors() {
    factors.g_scale = static_cast<float>(g_scale);
    split_factor(factors.k_g, k_g);
    split_factor(factors.p_g, p_g);
  }
};

}  // namespace batchops
