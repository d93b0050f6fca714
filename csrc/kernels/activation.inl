// The activations, each a functor over a lane type V (float in CUDA, a SIMD vector on the CPU, a
// tensor in the torch binding). Included once for each instruction set, once for CUDA and once for
// tensors, inside that build's namespace, after it has defined
//   BATCHOPS_INLINE, BATCHOPS_NOINLINE, and Scalar, the type that keeps a slope;
// and for its V, besides + - * / and V(number):
//   max(a, b), min(a, b)             NaN in `a` stays
//   select_le(a, b, yes, no)         a <= b ? yes : no
//   select_bits(bits, yes, no)       by what one access reads of a mask
//   abs, exp                         (a tensor has logistic() instead)
//   normal(z)                        Φ(z) and φ(z) of the standard normal distribution
// So there is no include guard here.
//
//   forward(z)             activation(z)
//   backward(dy, z)        dy · activation'(z)
//   backward_bits(dy, b)   the same from a bit, where kMaskable
//   kNeedsZ                whether backward reads z at all
//   kMaskable              activation'(z) takes two values, one of them 1, so a bit can stand for
//                          z: it is 1 where activation'(z) = 1. mask_source(z) is a number that is
//                          <= 0 exactly where the bit is 0.
//
// At the kinks, at NaN and at ±∞ they do as torch's operators: relu'(0) = 0 and relu'(NaN) = 1;
// leaky_relu' is the slope where z > 0 does not hold; hardswish'(-3) = 0 and hardswish'(3) = 1;
// the smooth ones are NaN at -∞.

struct Identity {
  static constexpr Activation kKind = Activation::none;
  static constexpr bool kNeedsZ = false;
  static constexpr bool kMaskable = false;
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    return z;
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V) {
    return dy;
  }
};

struct Relu {
  static constexpr Activation kKind = Activation::relu;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = true;
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    return select_le(z, V(0), V(0), z);
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V z) {
    return select_le(z, V(0), V(0), dy);
  }
  template <class V>
  BATCHOPS_INLINE static V mask_source(V z) {
    return z;
  }
  template <class V, class Bits>
  BATCHOPS_INLINE static V backward_bits(V dy, Bits bits) {
    return select_bits(bits, dy, V(0));
  }
};

struct LeakyRelu {
  static constexpr Activation kKind = Activation::leaky_relu;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = true;
  Scalar slope;
  template <class V>
  BATCHOPS_INLINE V forward(V z) const {
    return select_le(z, V(0), z * V(slope), z);
  }
  template <class V>
  BATCHOPS_INLINE V backward(V dy, V z) const {
    return select_le(mask_source(z), V(0), dy * V(slope), dy);
  }
  // NaN counts as not positive.
  template <class V>
  BATCHOPS_INLINE static V mask_source(V z) {
    return max(V(0), z);
  }
  template <class V, class Bits>
  BATCHOPS_INLINE V backward_bits(V dy, Bits bits) const {
    return select_bits(bits, dy, dy * V(slope));
  }
};

// σ(z) = 1 / (1 + e^-z) and 1 - σ(z) = σ(-z), neither of them by a difference.
template <class V>
struct Logistic {
  V value, complement;
};
template <class V>
BATCHOPS_INLINE Logistic<V> logistic(V z) {
  const V e = exp(V(0) - abs(z));
  const V large = V(1) / (V(1) + e);
  const V small = e * large;
  return {select_le(V(0), z, large, small), select_le(V(0), z, small, large)};
}

struct Silu {
  static constexpr Activation kKind = Activation::silu;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = false;
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    return z * logistic(z).value;
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V z) {
    const auto s = logistic(z);
    return dy * (s.value * (V(1) + z * s.complement));
  }
};

struct Gelu {
  static constexpr Activation kKind = Activation::gelu;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = false;
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    return z * normal(z).cdf;
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V z) {
    const auto n = normal(z);
    return dy * (n.cdf + z * n.pdf);
  }
};

// z · (1 + tanh(u)) / 2 = z · σ(2u),  2u = z · (k + l · z²),  k = √(8/π), l = 0.044715 · k
struct GeluTanh {
  static constexpr Activation kKind = Activation::gelu_tanh;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = false;
  static constexpr double k = 1.5957691216057307118, l = 0.044715 * k;
  // Beyond these σ has reached 0 or 1, in double too, and the cube might overflow.
  template <class V>
  BATCHOPS_INLINE static V clamp(V z) {
    return max(min(z, V(32)), V(-32));
  }
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    const V c = clamp(z);
    return z * logistic(c * (V(k) + V(l) * (c * c))).value;
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V z) {
    const V c = clamp(z), square = c * c;
    const auto s = logistic(c * (V(k) + V(l) * square));
    return dy * (s.value + z * s.value * s.complement * (V(k) + V(3 * l) * square));
  }
};

struct Hardswish {
  static constexpr Activation kKind = Activation::hardswish;
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = false;
  template <class V>
  BATCHOPS_INLINE static V forward(V z) {
    return z * (max(min(z + V(3), V(6)), V(0)) * V(1.0 / 6));
  }
  template <class V>
  BATCHOPS_INLINE static V backward(V dy, V z) {
    const V between = select_le(V(3), z, dy, dy * (z * V(1.0 / 3) + V(0.5)));
    return select_le(z, V(-3), V(0), between);
  }
};

template <class Functor>
constexpr Functor make_functor([[maybe_unused]] Scalar slope) {
  if constexpr (std::is_empty_v<Functor>) {
    return Functor{};
  } else {
    return Functor{slope};
  }
}

// Whether the backward must know z, and whether one bit of it is enough.
struct ActivationTraits {
  bool needs_z;
  bool maskable;
};
constexpr ActivationTraits traits_of(Activation activation) {
  switch (activation) {
#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return {functor::kNeedsZ, functor::kMaskable};
    BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_CASE)
#undef BATCHOPS_CASE
  }
  return {false, false};
}

// All of them, chosen at run time: what a kernel is compiled with for the activations that do not
// deserve an instance of their own. Here kNeedsZ and kMaskable only say what may be; traits_of()
// says what is.
struct AnyActivation {
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMaskable = true;
  Activation kind;
  Scalar slope;

#define BATCHOPS_CASE(name, functor) \
  case Activation::name:             \
    return make_functor<functor>(slope)
  template <class V>
  BATCHOPS_NOINLINE V forward(V z) const {
    switch (kind) {
#define BATCHOPS_FORWARD(name, functor) BATCHOPS_CASE(name, functor).forward(z);
      BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_FORWARD)
#undef BATCHOPS_FORWARD
    }
    return z;
  }
  template <class V>
  BATCHOPS_NOINLINE V backward(V dy, V z) const {
    switch (kind) {
#define BATCHOPS_BACKWARD(name, functor) BATCHOPS_CASE(name, functor).backward(dy, z);
      BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_BACKWARD)
#undef BATCHOPS_BACKWARD
    }
    return dy;
  }
#undef BATCHOPS_CASE
  template <class V>
  BATCHOPS_INLINE V mask_source(V z) const {
    return kind == Activation::relu ? z : LeakyRelu::mask_source(z);
  }
  template <class V, class Bits>
  BATCHOPS_INLINE V backward_bits(V dy, Bits bits) const {
    return select_bits(bits, dy, kind == Activation::relu ? V(0) : dy * V(slope));
  }
};

// Calls f(functor), with one of `Inlined` where that is the activation and AnyActivation elsewhere.
template <class... Inlined>
struct WithActivation {
  template <class F>
  static auto call(Activation activation, Scalar slope, F&& f) {
    return f(AnyActivation{activation, slope});
  }
};
template <class First, class... Rest>
struct WithActivation<First, Rest...> {
  template <class F>
  static auto call(Activation activation, Scalar slope, F&& f) {
    if (activation == First::kKind) return f(make_functor<First>(slope));
    return WithActivation<Rest...>::call(activation, slope, static_cast<F&&>(f));
  }
};
template <class... Inlined, class F>
auto with_activation(Activation activation, Scalar slope, F&& f) {
  return WithActivation<Inlined...>::call(activation, slope, static_cast<F&&>(f));
}
