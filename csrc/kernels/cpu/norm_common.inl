// What all norms share: scalars and channel values of any dtype, runs of vectors, mask bits.

// The precision of the arithmetic and of `stats` for elements stored as S.
template <class S>
using AccOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// z without the residual. Forward and backward call this one, so that relu's sign agrees bit for
// bit.
template <class V>
BATCHOPS_INLINE V normalize(V x, V mean, V scale, V shift) {
  return fma(x - mean, scale, shift);
}

// Every activation, chosen at run time. What costs less than a call is done in place.
struct GenericActivation : AnyActivation {
  template <class V>
  BATCHOPS_INLINE V forward(V z) const {
    if (kind == Activation::none) return z;
    if (kind == Activation::relu) return Relu::forward(z);
    return AnyActivation::forward(z);
  }
  template <class V>
  BATCHOPS_INLINE V backward(V dy, V z) const {
    if (kind == Activation::none) return dy;
    if (kind == Activation::relu) return Relu::backward(dy, z);
    return AnyActivation::backward(dy, z);
  }
};

template <class Act, class Shape>
inline Act activation_of(const Shape& shape) {
  const auto slope = static_cast<Scalar>(shape.slope);
  if constexpr (std::is_same_v<Act, GenericActivation>) {
    return {{shape.activation, slope}};
  } else {
    return make_functor<Act>(slope);
  }
}

// What z is made again from, besides x: nothing where the derivative does not ask for z.
template <class S, class Args>
inline const S* residual_of(const Args& args) {
  return traits_of(args.shape.activation).needs_z ? static_cast<const S*>(args.residual) : nullptr;
}

// Whether the usual activations have instances of their own for elements stored as S. Each costs
// time to compile, in every set: float and bfloat16 have them, but for x86-64 without AVX2.
#if defined(BATCHOPS_X86) && !defined(BATCHOPS_ISA_AVX2) && !defined(BATCHOPS_ISA_AVX512)
template <class S>
constexpr bool kOwnInstances = false;
#else
template <class S>
constexpr bool kOwnInstances = std::is_same_v<S, float> || std::is_same_v<S, BFloat16>;
#endif

// Calls f(functor), with one of `Own` where S has instances of its own and that is the activation,
// else with GenericActivation.
template <class S, class... Own, class Shape, class F>
inline auto with_instance(const Shape& shape, F&& f) {
  const auto generic = [&] { return f(activation_of<GenericActivation>(shape)); };
  if constexpr (kOwnInstances<S>) {
    return with_activation<Own...>(shape.activation, shape.slope, [&](const auto& act) {
      using Act = std::remove_cvref_t<decltype(act)>;
      if constexpr (std::is_same_v<Act, AnyActivation>) {
        return generic();
      } else {
        return f(act);
      }
    });
  } else {
    return generic();
  }
}

// n values of (mean, M2 = Σ (x - mean)²), and m of (mean2, m22) (Chan, Golub, LeVeque 1979):
//   d = mean2 - mean,   mean += d · m / (n + m),   M2 += m22 + d² · n · m / (n + m)
BATCHOPS_INLINE void merge_moments(double n, double m, double& mean, double& m2, double mean2,
                                   double m22) {
  const double d = mean2 - mean, w = m / (n + m);
  mean += d * w;
  m2 += m22 + d * d * (n * w);
}

// ---------------------------------------------------------------------- scalars of any dtype

inline float to_float(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(Half a) {
  Half lanes[Vec<float>::kLanes] = {a};
  return load<float>(lanes).v[0];
}
inline float to_float(float a) { return a; }
inline double to_float(double a) { return a; }

template <class S, class T>
BATCHOPS_INLINE void put(S* p, T value) {
  if constexpr (sizeof(S) == 2) {
    store(p, Vec<float>(static_cast<float>(value)), 1);
  } else {
    *p = static_cast<S>(value);
  }
}

// Calls f with a null pointer of the storage type.
template <class F>
BATCHOPS_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
}

// The same for the elements of x and y, of those dtypes that isa_for() gives this set.
template <class F>
BATCHOPS_INLINE void with_element(DType dtype, F&& f) {
#if defined(BATCHOPS_ISA_AVX512)
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  return f(static_cast<BFloat16*>(nullptr));
#else
  with_dtype(dtype, std::forward<F>(f));
#endif
}

// out[i] = values[first + i], or `otherwise` where there are no values.
template <class T>
BATCHOPS_NOINLINE void read_channels(T* out, const void* values, DType dtype, int64_t first,
                                     int64_t count, T otherwise) {
  if (values == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = otherwise;
    return;
  }
  with_dtype(dtype, [&](auto* type) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(values) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(to_float(from[i]));
  });
}
template <class T>
BATCHOPS_NOINLINE void write_channels(void* values, DType dtype, int64_t first, int64_t count,
                                      const T* in) {
  if (values == nullptr) return;
  with_dtype(dtype, [&](auto* type) {
    auto* to = static_cast<std::remove_pointer_t<decltype(type)>*>(values) + first;
    for (int64_t i = 0; i < count; ++i) put(to + i, in[i]);
  });
}

// ------------------------------------------------------------------------------- runs

// Lanes of one access: all of a vector, or its first n.
struct All {};
struct First {
  int64_t n;
};
template <class T, class S>
BATCHOPS_INLINE Vec<T> load(const S* p, All) {
  return load<T>(p);
}
template <class T, class S>
BATCHOPS_INLINE Vec<T> load(const S* p, First part) {
  return load<T>(p, part.n);
}
template <class T, class S>
BATCHOPS_INLINE void put(S* p, Vec<T> a, All, bool past_cache) {
  if (past_cache) {
    stream(p, a);
  } else {
    store(p, a);
  }
}
template <class T, class S>
BATCHOPS_INLINE void put(S* p, Vec<T> a, First part, bool) {
  store(p, a, part.n);
}

// How many elements lie before the next boundary of a vector's size at `p`.
template <class T, class S>
BATCHOPS_INLINE int64_t to_boundary(const S* p) {
  constexpr int64_t kBytes = Vec<T>::kLanes * sizeof(S);
  return (kBytes - reinterpret_cast<uintptr_t>(p) % kBytes) % kBytes / sizeof(S);
}

template <class T>
constexpr int64_t kBlock = 4 * Vec<T>::kLanes;

// Calls vector(j, lanes, u) over [0, n), u counting 0…3 within a block of four, and
// begin(j, bytes) / end(j, bytes) around each block with the number of mask bytes it covers.
template <class T, class Begin, class Vector, class End>
BATCHOPS_INLINE void for_blocks(int64_t from, int64_t n, Begin&& begin, Vector&& vector,
                                End&& end) {
  constexpr int L = Vec<T>::kLanes;
  int64_t j = from;
  for (; j + kBlock<T> <= n; j += kBlock<T>) {
    begin(j, std::integral_constant<int, kBlock<T> / 8>{});
    vector(j, All{}, 0);
    vector(j + L, All{}, 1);
    vector(j + 2 * L, All{}, 2);
    vector(j + 3 * L, All{}, 3);
    end(j, std::integral_constant<int, kBlock<T> / 8>{});
  }
  if (j == n) return;
  const int64_t start = j;
  const int bytes = static_cast<int>((n - j + 7) / 8);
  begin(start, bytes);
  int u = 0;
  for (; j + L <= n; j += L) vector(j, All{}, u++);
  if (j < n) vector(j, First{n - j}, u);
  end(start, bytes);
}

// ------------------------------------------------------------------------------- mask bits

template <class Bytes>
BATCHOPS_INLINE uint64_t read_bits(const uint8_t* p, Bytes bytes) {
  uint64_t bits = 0;
  if constexpr (std::is_same_v<Bytes, int>) {
    for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(p[i]) << (8 * i);
  } else {
    std::memcpy(&bits, p, Bytes::value);
  }
  return bits;
}
template <class Bytes>
BATCHOPS_INLINE void write_bits(uint8_t* p, uint64_t bits, Bytes bytes) {
  if constexpr (std::is_same_v<Bytes, int>) {
    for (int i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(bits >> (8 * i));
  } else {
    std::memcpy(p, &bits, Bytes::value);
  }
}

// A kernel wants the bits of a row of columns in one string; the mask pads the run of each
// channel (or pixel) to whole bytes. `runs` runs of `length` bits, sixteen bytes of slack on
// `flat`. Both sides are taken by whole words, as the kernel writes and reads its string: a load
// that spans two stores waits until both have left the core.
inline void pad_runs(uint8_t* mask, const uint8_t* flat, int64_t runs, int64_t length) {
  const uint8_t* const end = mask + runs * ((length + 7) / 8);
  int64_t position = 0;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t left = length; left > 0; left -= 64) {
      const int64_t count = left < 64 ? left : 64, bytes = (count + 7) / 8;
      const int shift = static_cast<int>(position % 64);
      uint64_t bits, next;
      std::memcpy(&bits, flat + position / 64 * 8, 8);
      bits >>= shift;
      if (shift + count > 64) {
        std::memcpy(&next, flat + position / 64 * 8 + 8, 8);
        bits |= next << (64 - shift);
      }
      if (count < 64) bits &= (uint64_t{1} << count) - 1;
      if (end - mask >= 8) {
        std::memcpy(mask, &bits, 8);  // what is past this run is written after it
      } else {
        write_bits(mask, bits, static_cast<int>(bytes));
      }
      mask += bytes;
      position += count;
    }
  }
}
inline void join_runs(uint8_t* flat, const uint8_t* mask, int64_t runs, int64_t length) {
  const uint8_t* const end = mask + runs * ((length + 7) / 8);
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t left = length; left > 0; left -= 64) {
      const int count = static_cast<int>(left < 64 ? left : 64), bytes = (count + 7) / 8;
      uint64_t bits = 0;
      if (end - mask >= 8) {
        std::memcpy(&bits, mask, 8);
      } else {
        for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(mask[i]) << (8 * i);
      }
      if (count < 64) bits &= (uint64_t{1} << count) - 1;
      mask += bytes;
      pending |= bits << filled;
      filled += count;
      if (filled >= 64) {
        std::memcpy(flat, &pending, 8);
        flat += 8;
        filled -= 64;
        // What did not fit; a shift by 64 is not one.
        pending = filled == 0 ? 0 : bits >> (count - filled);
      }
    }
  }
  std::memcpy(flat, &pending, 8);
}

// ------------------------------------------------------------------------------- order of work

// Below this many elements a fork costs more than it saves.
constexpr int64_t kForkElements = 32768;
// Outputs from this size on are not read back from the cache by what follows.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

template <class Shape>
inline bool streams(const Shape& shape) {
  return shape.numel() * size_of(shape.dtype) >= kStreamBytes;
}

// A row at a time, sums of 16-bit columns wait on arithmetic, not on memory, and take several rows
// together even where those come from memory, as long as they lie within a page or two.
inline bool sums_wait(DType dtype, int64_t rows, int64_t width) {
  return size_of(dtype) == 2 && rows * width * 2 <= 8192;
}
