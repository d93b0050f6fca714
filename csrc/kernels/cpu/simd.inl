// Vectors of one instruction set. Included by for_each_isa.inl inside that set's namespace and
// target, so there is no include guard here. The types are the compiler's own vectors at the set's
// natural width; intrinsics stand only where those have no word for it.

#if defined(BATCHOPS_ISA_AVX512)
constexpr int kVecBytes = 64;
#elif defined(BATCHOPS_ISA_AVX2)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef uint32_t U __attribute__((vector_size(kVecBytes)));
  typedef uint16_t U16 __attribute__((vector_size(kVecBytes / 2)));
  typedef uint16_t U16Unaligned __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
};
template <>
struct Native<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef double Unaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef uint64_t U __attribute__((vector_size(kVecBytes)));
};

template <class T>
struct Vec {
  using Lane = T;
  using V = typename Native<T>::V;
  using U = typename Native<T>::U;
  static constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

  V v;

  Vec() = default;
  BATCHOPS_INLINE Vec(V native) : v(native) {}
  BATCHOPS_INLINE explicit Vec(T scalar) : v(scalar - V{}) {}

  BATCHOPS_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  BATCHOPS_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  BATCHOPS_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  BATCHOPS_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  BATCHOPS_INLINE friend Vec operator-(Vec a) { return -a.v; }
};

// a * b + c, rounded once where the set has FMA.
BATCHOPS_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(BATCHOPS_ISA_AVX2)
  return _mm256_fmadd_ps(a.v, b.v, c.v);
#elif defined(__aarch64__)
  return vfmaq_f32(c.v, a.v, b.v);
#else
  return a.v * b.v + c.v;
#endif
}
BATCHOPS_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_fmadd_pd(a.v, b.v, c.v);
#elif defined(BATCHOPS_ISA_AVX2)
  return _mm256_fmadd_pd(a.v, b.v, c.v);
#elif defined(__aarch64__)
  return vfmaq_f64(c.v, a.v, b.v);
#else
  return a.v * b.v + c.v;
#endif
}

BATCHOPS_INLINE Vec<float> sqrt(Vec<float> a) {
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_sqrt_ps(a.v);
#elif defined(BATCHOPS_ISA_AVX2)
  return _mm256_sqrt_ps(a.v);
#elif defined(BATCHOPS_X86)
  return _mm_sqrt_ps(a.v);
#elif defined(__aarch64__)
  return vsqrtq_f32(a.v);
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
#endif
}
BATCHOPS_INLINE Vec<double> sqrt(Vec<double> a) {
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_sqrt_pd(a.v);
#elif defined(BATCHOPS_ISA_AVX2)
  return _mm256_sqrt_pd(a.v);
#elif defined(BATCHOPS_X86)
  return _mm_sqrt_pd(a.v);
#elif defined(__aarch64__)
  return vsqrtq_f64(a.v);
#else
  for (int i = 0; i < Vec<double>::kLanes; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
#endif
}

// a <= b ? yes : no. False where either is NaN.
template <class T>
BATCHOPS_INLINE Vec<T> select_le(Vec<T> a, Vec<T> b, Vec<T> yes, Vec<T> no) {
  return (a.v <= b.v) ? yes.v : no.v;
}
// NaN in `a` stays, NaN in `b` does not.
template <class T>
BATCHOPS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return (a.v < b.v) ? b.v : a.v;
}
template <class T>
BATCHOPS_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return (b.v < a.v) ? b.v : a.v;
}
template <class T>
BATCHOPS_INLINE Vec<T> abs(Vec<T> a) {
  using U = typename Native<T>::U;
  constexpr auto kNoSign = sizeof(T) == 4 ? uint64_t{0x7fffffff} : ~(uint64_t{1} << 63);
  return (typename Native<T>::V)((U)a.v & static_cast<decltype(U{}[0] + 0)>(kNoSign));
}

// -------------------------------------------------------------------- 16-bit floats and float

// To bfloat16, round to nearest even; NaN stays NaN (quiet). The result is in the low halves.
BATCHOPS_INLINE Native<float>::U bf16_bits(Vec<float> a) {
  using U = Native<float>::U;
  const U bits = (U)a.v;
  const U rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return (a.v == a.v) ? rounded : quiet;
}

#if !defined(BATCHOPS_ISA_AVX512) && !defined(BATCHOPS_ISA_AVX2)
// Shifting the 15 low bits of a half under float's exponent gives the value times 2^-112, exactly,
// subnormals included.
BATCHOPS_INLINE Vec<float> half_bits_to_float(Native<float>::U h) {
  using U = Native<float>::U;
  using V = Native<float>::V;
  const U sign = (h & 0x8000u) << 16;
  const U magnitude = (h & 0x7fffu) << 13;
  const U finite = (U)((V)magnitude * 0x1p112f);
  const U special = magnitude | 0x7f800000u;
  return (V)(sign | (((h & 0x7c00u) == 0x7c00u) ? special : finite));
}
// Round to nearest even. Below 2^-14 the addition of 0.5 lines the subnormal's last bit up with
// float's last bit and so rounds there.
BATCHOPS_INLINE Native<float>::U half_bits(Vec<float> a) {
  using U = Native<float>::U;
  using V = Native<float>::V;
  const U bits = (U)a.v;
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const U normal = (magnitude - (112u << 23) + ((magnitude >> 13) & 1u) + 0xfffu) >> 13;
  const U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000u;
  const U infinite = U{} + 0x7c00u;
  const U nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  U result = (magnitude < (113u << 23)) ? subnormal : normal;
  result = (magnitude >= (143u << 23)) ? infinite : result;
  result = (magnitude > 0x7f800000u) ? nan : result;
  return result | (sign >> 16);
}
#endif

// ----------------------------------------------------------------------------- loads and stores

template <class T>
BATCHOPS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Native<T>::Unaligned*>(p);
}
template <class T>
BATCHOPS_INLINE void store(T* p, Vec<T> a) {
  *reinterpret_cast<typename Native<T>::Unaligned*>(p) = a.v;
}

#if defined(BATCHOPS_ISA_AVX512)
// Each 16-bit word into the upper half of a lane: one shuffle instead of widening and shifting.
BATCHOPS_INLINE Vec<float> widen_bf16(__m256i words) {
  const __m512i from =
      (__m512i)(Native<float>::U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16);
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(words)));
}
#endif
template <class T>
BATCHOPS_INLINE Vec<float> load(const BFloat16* p) {
  static_assert(std::is_same_v<T, float>);
#if defined(BATCHOPS_ISA_AVX512)
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(BATCHOPS_ISA_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#elif defined(BATCHOPS_X86)
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
#else
  const auto bits = *reinterpret_cast<const Native<float>::U16Unaligned*>(p);
  return (Native<float>::V)(__builtin_convertvector(bits, Native<float>::U) << 16);
#endif
}
template <class T>
BATCHOPS_INLINE Vec<float> load(const Half* p) {
  static_assert(std::is_same_v<T, float>);
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(BATCHOPS_ISA_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const auto bits = *reinterpret_cast<const Native<float>::U16Unaligned*>(p);
  return half_bits_to_float(__builtin_convertvector(bits, Native<float>::U));
#endif
}

// The lanes of `a` in 16 bits each, packed.
#if defined(BATCHOPS_ISA_AVX512)
BATCHOPS_INLINE __m256i pack(Vec<float> a, const BFloat16*) {
  return _mm512_cvtepi32_epi16((__m512i)bf16_bits(a));
}
BATCHOPS_INLINE __m256i pack(Vec<float> a, const Half*) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class S>
  requires(sizeof(S) == 2)
BATCHOPS_INLINE void store(S* p, Vec<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
}
#elif defined(BATCHOPS_ISA_AVX2)
BATCHOPS_INLINE __m128i pack(Vec<float> a, const BFloat16*) {
  const __m256i bits = (__m256i)bf16_bits(a);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
BATCHOPS_INLINE __m128i pack(Vec<float> a, const Half*) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class S>
  requires(sizeof(S) == 2)
BATCHOPS_INLINE void store(S* p, Vec<float> a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack(a, p));
}
#else
BATCHOPS_INLINE Native<float>::U16 pack(Vec<float> a, const BFloat16*) {
  return __builtin_convertvector(bf16_bits(a), Native<float>::U16);
}
BATCHOPS_INLINE Native<float>::U16 pack(Vec<float> a, const Half*) {
  return __builtin_convertvector(half_bits(a), Native<float>::U16);
}
template <class S>
  requires(sizeof(S) == 2)
BATCHOPS_INLINE void store(S* p, Vec<float> a) {
  *reinterpret_cast<Native<float>::U16Unaligned*>(p) = pack(a, p);
}
#endif

// Part of a vector: the first n lanes, 0 <= n <= kLanes.
template <class T, class S>
BATCHOPS_INLINE Vec<T> load(const S* p, int64_t n) {
#if defined(BATCHOPS_ISA_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (std::is_same_v<S, float>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first), p);
  } else if constexpr (std::is_same_v<S, double>) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first), p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first), p);
    if constexpr (std::is_same_v<S, Half>) return _mm512_cvtph_ps(bits);
    return widen_bf16(bits);
  }
#else
  S lanes[Vec<T>::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<T>(lanes);
#endif
}
template <class T, class S>
BATCHOPS_INLINE void store(S* p, Vec<T> a, int64_t n) {
#if defined(BATCHOPS_ISA_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first), a.v);
  } else if constexpr (std::is_same_v<S, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first), a.v);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first), pack(a, p));
  }
#else
  S lanes[Vec<T>::kLanes];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// Past the cache: for outputs that are too large to be read back from it. `p` must be aligned to
// kLanes * sizeof(S). Call fence() before another thread may read.
template <class T, class S>
BATCHOPS_INLINE void stream(S* p, Vec<T> a) {
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_stream_ps(p, a.v);
  } else if constexpr (std::is_same_v<S, double>) {
    _mm512_stream_pd(p, a.v);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
  }
#elif defined(BATCHOPS_ISA_AVX2)
  if constexpr (std::is_same_v<S, float>) {
    _mm256_stream_ps(p, a.v);
  } else if constexpr (std::is_same_v<S, double>) {
    _mm256_stream_pd(p, a.v);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), pack(a, p));
  }
#elif defined(BATCHOPS_X86)
  if constexpr (std::is_same_v<S, float>) {
    _mm_stream_ps(p, a.v);
  } else if constexpr (std::is_same_v<S, double>) {
    _mm_stream_pd(p, a.v);
  } else {
    _mm_stream_si64(reinterpret_cast<long long*>(p), (long long)pack(a, p));
  }
#else
  store(p, a);
#endif
}
BATCHOPS_INLINE void fence() {
#if defined(BATCHOPS_X86)
  _mm_sfence();
#endif
}
template <class T, class S>
BATCHOPS_INLINE bool can_stream(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (Vec<T>::kLanes * sizeof(S)) == 0;
}

// Asks for the line of p[offset], which may lie outside the array.
template <class S>
BATCHOPS_INLINE void prefetch(const S* p, int64_t offset) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset) * sizeof(S);
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
}
// The hardware's prefetchers stop at the end of a page. So who reads from memory asks for what lies
// so many elements ahead: two kilobytes, which one was 2-10 % slower than and four no better.
template <class S>
constexpr int64_t kAhead = 2048 / static_cast<int64_t>(sizeof(S));

// ------------------------------------------------------------------------ reductions and bits

// The lanes of a float vector as two double vectors, low lanes first.
BATCHOPS_INLINE void widen(Vec<float> a, Vec<double>& low, Vec<double>& high) {
#if defined(BATCHOPS_ISA_AVX512)
  low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
#elif defined(BATCHOPS_ISA_AVX2)
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
#elif defined(BATCHOPS_X86)
  low = _mm_cvtps_pd(a.v);
  high = _mm_cvtps_pd(_mm_movehl_ps(a.v, a.v));
#else
  for (int i = 0; i < Vec<double>::kLanes; ++i) {
    low.v[i] = a.v[i];
    high.v[i] = a.v[i + Vec<double>::kLanes];
  }
#endif
}

BATCHOPS_INLINE double sum(Vec<double> a) {
#if defined(BATCHOPS_ISA_AVX512)
  return _mm512_reduce_add_pd(a.v);
#elif defined(BATCHOPS_ISA_AVX2)
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return half[0] + half[1];
#else
  return a.v[0] + a.v[1];
#endif
}
BATCHOPS_INLINE double sum(Vec<float> a) {
  Vec<double> low, high;
  widen(a, low, high);
  return sum(low + high);
}

// total[i] += lane i.
BATCHOPS_INLINE void accumulate(double* total, Vec<double> a) {
  store(total, load<double>(total) + a);
}
BATCHOPS_INLINE void accumulate(double* total, Vec<float> a) {
  Vec<double> low, high;
  widen(a, low, high);
  accumulate(total, low);
  accumulate(total + Vec<double>::kLanes, high);
}

// Bit i is set where lane i is not <= 0, so also where it is NaN.
template <class T>
BATCHOPS_INLINE uint64_t positive_bits(Vec<T> a) {
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
#elif defined(BATCHOPS_ISA_AVX2)
  if constexpr (sizeof(T) == 4) {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
  } else {
    return static_cast<uint32_t>(
        _mm256_movemask_pd(_mm256_cmp_pd(a.v, _mm256_setzero_pd(), _CMP_NLE_UQ)));
  }
#elif defined(BATCHOPS_X86)
  if constexpr (sizeof(T) == 4) {
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnle_ps(a.v, _mm_setzero_ps())));
  } else {
    return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpnle_pd(a.v, _mm_setzero_pd())));
  }
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) bits |= uint64_t{!(a.v[i] <= 0)} << i;
  return bits;
#endif
}
// Lane i where bit i is set, 0 elsewhere. Higher bits do not matter.
template <class T>
BATCHOPS_INLINE Vec<T> keep(uint64_t bits, Vec<T> a) {
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v);
  } else {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), a.v);
  }
#else
  using U = typename Native<T>::U;
  U lane_bit;
  for (int i = 0; i < Vec<T>::kLanes; ++i) lane_bit[i] = 1u << i;
  const U all = U{} + static_cast<decltype(U{}[0] + 0)>(bits);
  return (typename Native<T>::V)((U)a.v & (U)((all & lane_bit) == lane_bit));
#endif
}

// Lane i of `yes` where bit i is set, of `no` elsewhere. Higher bits do not matter.
template <class T>
BATCHOPS_INLINE Vec<T> select_bits(uint64_t bits, Vec<T> yes, Vec<T> no) {
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_mov_ps(no.v, static_cast<__mmask16>(bits), yes.v);
  } else {
    return _mm512_mask_mov_pd(no.v, static_cast<__mmask8>(bits), yes.v);
  }
#else
  using U = typename Native<T>::U;
  U lane_bit;
  for (int i = 0; i < Vec<T>::kLanes; ++i) lane_bit[i] = 1u << i;
  const U all = U{} + static_cast<decltype(U{}[0] + 0)>(bits);
  return ((all & lane_bit) == lane_bit) ? yes.v : no.v;
#endif
}

// Lane i of `a` where i < n, of `b` elsewhere.
template <class T>
BATCHOPS_INLINE Vec<T> first_of(int64_t n, Vec<T> a, Vec<T> b) {
#if defined(BATCHOPS_ISA_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_mov_ps(b.v, static_cast<__mmask16>(first), a.v);
  } else {
    return _mm512_mask_mov_pd(b.v, static_cast<__mmask8>(first), a.v);
  }
#else
  using U = typename Native<T>::U;
  U lane;
  for (int i = 0; i < Vec<T>::kLanes; ++i) lane[i] = i;
  return (lane < U{} + static_cast<decltype(U{}[0] + 0)>(n)) ? a.v : b.v;
#endif
}

// ------------------------------------------------------------------------------ functions

// e^a within 2 ulp; 0 below the smallest normal's logarithm, inf above the largest, NaN for NaN.
//   n = round(a / ln 2), r = a - n ln 2 in two steps, e^a = 2^n (1 + r + r² P(r))
BATCHOPS_INLINE Vec<float> exp(Vec<float> a) {
  using V = Vec<float>;
  using U = Native<float>::U;
  const V clamped = min(max(a, V(-104.0f)), V(89.0f));
  const V shifter(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const V n = fma(clamped, V(1.44269504f), shifter) - shifter;
  V r = fma(n, V(-0.693359375f), clamped);
  r = fma(n, V(2.12194440e-4f), r);
  V p(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) p = fma(p, r, V(c));
  p = fma(p, r * r, r) + V(1.0f);
  // 2^n in two factors, since n reaches from -150 to 128.
  const V half = fma(n, V(0.5f), shifter) - shifter;
  const auto power = [](V k) BATCHOPS_INLINE_LAMBDA {
    const V magic(12582912.0f + 127.0f);
    return V((Native<float>::V)((U)(k + magic).v << 23));
  };
  return p * power(half) * power(n - half);
}
BATCHOPS_INLINE Vec<double> exp(Vec<double> a) {
  using V = Vec<double>;
  using U = Native<double>::U;
  const V clamped = min(max(a, V(-746.0)), V(710.0));
  const V shifter(6755399441055744.0);  // 1.5 · 2^52
  const V n = fma(clamped, V(1.4426950408889634), shifter) - shifter;
  V r = fma(n, V(-6.93145751953125e-1), clamped);
  r = fma(n, V(-1.42860682030941723212e-6), r);
  V p(1.0 / 6227020800.0);
  for (double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                   1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5}) {
    p = fma(p, r, V(c));
  }
  p = fma(p, r * r, r) + V(1.0);
  const V half = fma(n, V(0.5), shifter) - shifter;
  const auto power = [](V k) BATCHOPS_INLINE_LAMBDA {
    const V magic(6755399441055744.0 + 1023.0);
    return V((Native<double>::V)((U)(k + magic).v << 52));
  };
  return p * power(half) * power(n - half);
}

// The standard normal distribution: Φ(z) = ∫ φ up to z, φ(z) = e^(-z²/2) / √(2π).
template <class V>
struct Normal {
  V cdf, pdf;
};

// Within 4 ulp on either side, since neither is found as a difference of larger numbers:
//   with x = |z|,  Φ(-x) = e^(-x²/2) P(t) / (x + 4),  t = (x - 4) / (x + 4)
// P approximates (x + 4) e^(x²/2) Φ(-x) over 0 <= x <= 15 within 1e-8; beyond, Φ(-x) is 0 in float.
BATCHOPS_INLINE Normal<Vec<float>> normal(Vec<float> z) {
  using V = Vec<float>;
  const V x = min(abs(z), V(15.0f));
  // What the square loses to rounding would cost as many ulp as x² / 2.
  const V square = x * x;
#if defined(BATCHOPS_ISA_AVX512) || defined(BATCHOPS_ISA_AVX2) || defined(__aarch64__)
  const V lost = fma(x, x, -square);
#else
  const V high = (Native<float>::V)((Native<float>::U)x.v & 0xfffff000u), low = x - high;
  const V lost = ((high * high - square) + V(2.0f) * high * low) + low * low;
#endif
  const V e = exp(V(-0.5f) * square);
  const V density = fma(e, V(-0.5f) * lost, e);
  const V inverse = V(1.0f) / (x + V(4.0f));
  const V t = (x - V(4.0f)) * inverse;
  V p(-1.34197427541948855e-4f);
  for (float c : {1.74657267052680254e-4f, 1.56840821728110313e-3f, -3.51020949892699718e-3f,
                  -7.52400420606136322e-3f, 6.04034885764122009e-2f, -1.86523661017417908e-1f,
                  3.87136906385421753e-1f, -6.07896566390991211e-1f, 7.55285143852233887e-1f}) {
    p = fma(p, t, V(c));
  }
  const V tail = density * (p * inverse);
  return {select_le(z, V(0.0f), tail, V(1.0f) - tail), density * V(0.398942280f)};
}

// Lane by lane: the C library's erfc is exact to an ulp, and gelu in double is rare.
//   Φ(z) = erfc(w) / 2, w = -z / √2,  with erfc'(w) = -2/√π · e^(-w²) for what w loses to rounding
inline __attribute__((noinline)) Normal<Vec<double>> normal(Vec<double> z) {
  constexpr double kInverseRoot2 = 0.70710678118654752440, kRest = -4.8336466567264567e-17;
  Normal<Vec<double>> result;
  for (int i = 0; i < Vec<double>::kLanes; ++i) {
    const double a = z.v[i], w = -a * kInverseRoot2;
    const double square = a * a, lost = std::fma(a, a, -square);
    double e = std::exp(-0.5 * square);
    if (e != 0) e -= 0.5 * e * lost;
    double tail = 0.5 * std::erfc(w);
    if (tail != 0 && tail < 0.5) {
      const double rounding = -(std::fma(a, kInverseRoot2, w) + a * kRest);
      tail -= 0.56418958354775628695 * e * rounding;
    }
    result.cdf.v[i] = tail;
    result.pdf.v[i] = 0.39894228040143267794 * e;
  }
  return result;
}

// What an activation keeps its slope in, for any Vec.
using Scalar = double;
