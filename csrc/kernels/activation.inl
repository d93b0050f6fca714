// The activations, each a functor over a lane type V (float in CUDA, a SIMD vector on the CPU).
// Included once for each instruction set and once for CUDA, inside that build's namespace, after it
// has defined for its V:  V max(V, V),  V select_le(V a, V b, V yes, V no)  [a <= b ? yes : no],
// and BATCHOPS_INLINE. So there is no include guard here.
//
//   forward(z)       activation(z)
//   backward(dy, z)  dy · activation'(z)
//   kNeedsZ          whether backward reads z at all
//   kMaskable        activation' is 0 where z <= 0 and 1 elsewhere, so a bit can stand for z
//
// NaN: forward(NaN) is NaN and backward passes dy, as torch's relu does.

struct Identity {
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
};
