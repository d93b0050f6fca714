#include "kernels/activation.inl"
#include "kernels/cpu/silu.inl"

template <class T, class Act>
int run_over(const Act& act, bool bits, bool maskable, const T* dy, const T* z, T* out, int64_t n) {
  if (bits && !maskable) return 1;
  constexpr int L = Vec<T>::kLanes;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    const Vec<T> at = load<T>(z + i, left);
    Vec<T> result;
    if (dy == nullptr) {
      result = act.forward(at);
    } else if (bits) {
      if constexpr (Act::kMaskable) {
        const uint64_t from = positive_bits(act.mask_source(at));
        result = act.backward_bits(load<T>(dy + i, left), from);
      }
    } else {
      result = act.backward(load<T>(dy + i, left), at);
    }
    store(out + i, result, left);
  }
  return 0;
}

int run_activation(Activation activation, double slope, int own, bool bits, DType dtype,
                   const void* dy, const void* z, void* out, int64_t n) {
  const bool maskable = traits_of(activation).maskable;
  const auto run = [&](const auto& act) {
    if (dtype == DType::f64) {
      return run_over(act, bits, maskable, static_cast<const double*>(dy),
                      static_cast<const double*>(z), static_cast<double*>(out), n);
    }
    return run_over(act, bits, maskable, static_cast<const float*>(dy),
                    static_cast<const float*>(z), static_cast<float*>(out), n);
  };
  if (own == 0) return run(AnyActivation{activation, slope});
  if (own == 2) return run(FastSilu<false>{});
  if (own == 3) return run(FastSilu<true>{});
  return with_activation<Identity, Relu, LeakyRelu, Silu, Gelu, GeluTanh, Hardswish>(activation,
                                                                                     slope, run);
}
