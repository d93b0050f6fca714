// Two vectors of neighbouring elements at once. That is worth its own type for bfloat16 in AVX2 and
// AVX-512: one vector of words turns into two of floats with one instruction each, and back with
// half of what each alone would take.

// Whether a pair's elements lie in its vectors in another order than in memory, where the first L
// come first. In AVX2 the first vector has the elements of the first and third half vector and the
// second those of the second and fourth, as the instructions that interleave words leave them. In
// AVX-512 the first has those at even places, the lower words of 32 bits each, and the second those
// at odd places.
#if defined(BATCHOPS_ISA_AVX2) || defined(BATCHOPS_ISA_AVX512)
template <class S>
constexpr bool kSwapped = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool kSwapped = false;
#endif

template <class T>
struct Pair {
  using V = Vec<T>;
  V a, b;

  Pair() = default;
  BATCHOPS_INLINE Pair(V both) : a(both), b(both) {}
  BATCHOPS_INLINE Pair(V first, V second) : a(first), b(second) {}

  BATCHOPS_INLINE friend Pair operator+(Pair p, Pair q) { return {p.a + q.a, p.b + q.b}; }
  BATCHOPS_INLINE friend Pair operator-(Pair p, Pair q) { return {p.a - q.a, p.b - q.b}; }
  BATCHOPS_INLINE friend Pair operator*(Pair p, Pair q) { return {p.a * q.a, p.b * q.b}; }
  BATCHOPS_INLINE friend Pair fma(Pair p, Pair q, Pair r) {
    return {fma(p.a, q.a, r.a), fma(p.b, q.b, r.b)};
  }
};

// Lanes of one access, as All and First: all of a pair, or the first n elements' and zeros.
struct Two {};
struct Rest {
  int64_t n;
};

template <class Act, class T>
BATCHOPS_INLINE Vec<T> activation(const Act& act, Vec<T> z) {
  return act.forward(z);
}
template <class Act, class T>
BATCHOPS_INLINE Pair<T> activation(const Act& act, Pair<T> z) {
  return {act.forward(z.a), act.forward(z.b)};
}
template <class Act, class T>
BATCHOPS_INLINE Vec<T> derivative_of(const Act& act, Vec<T> dy, Vec<T> z) {
  return act.backward(dy, z);
}
template <class Act, class T>
BATCHOPS_INLINE Pair<T> derivative_of(const Act& act, Pair<T> dy, Pair<T> z) {
  return {act.backward(dy.a, z.a), act.backward(dy.b, z.b)};
}

// ----------------------------------------------------------------------------- loads and stores

#if defined(BATCHOPS_ISA_AVX512)
BATCHOPS_INLINE Pair<float> unpack(__m512i words) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, odd))};
}
#endif

template <class T, class S>
BATCHOPS_INLINE Pair<T> load(const S* p, Two) {
#if defined(BATCHOPS_ISA_AVX2)
  if constexpr (kSwapped<S>) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i zero = _mm256_setzero_si256();
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words))};
  }
#elif defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) return unpack(_mm512_loadu_si512(p));
#endif
  return {load<T>(p), load<T>(p + Vec<T>::kLanes)};
}
template <class T, class S>
BATCHOPS_INLINE Pair<T> load(const S* p, Rest part) {
  constexpr int64_t L = Vec<T>::kLanes;
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    const auto first = static_cast<__mmask32>((uint64_t{1} << part.n) - 1);
    return unpack(_mm512_maskz_loadu_epi16(first, p));
  }
#endif
  if constexpr (kSwapped<S>) {
    S elements[2 * L] = {};
    for (int64_t i = 0; i < part.n; ++i) elements[i] = p[i];
    return load<T>(elements, Two{});
  }
  if (part.n < L) return {load<T>(p, part.n), Vec<T>(T(0))};
  return {load<T>(p), load<T>(p + L, part.n - L)};
}

#if defined(BATCHOPS_ISA_AVX2)
// Rounds as pack() does. NaN is so rare that both vectors share one test for it.
BATCHOPS_INLINE __m256i pack(Pair<float> a) {
  using U = Native<float>::U;
  const auto rounded = [](Vec<float> v) BATCHOPS_INLINE_LAMBDA {
    const U bits = (U)v.v;
    return (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  };
  U first = rounded(a.a), second = rounded(a.b);
  if (_mm256_movemask_ps(_mm256_cmp_ps(a.a.v, a.b.v, _CMP_UNORD_Q)) != 0) [[unlikely]] {
    first = bf16_bits(a.a);
    second = bf16_bits(a.b);
  }
  return _mm256_packus_epi32((__m256i)first, (__m256i)second);
}
#elif defined(BATCHOPS_ISA_AVX512)
// Rounds as pack() does. NaN is so rare that both vectors share one test for it.
BATCHOPS_INLINE __m512i pack(Pair<float> a) {
  using U = Native<float>::U;
  if (has_avx512_bf16) {
    // In assembly because the set as a whole does not include the instruction. It takes subnormals
    // for zero, which the other way keeps; it rounds and treats NaN alike. Its words are those of
    // the first vector and then those of the second.
    __m512i words;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(a.a.v), "v"(a.b.v));
    const U first{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_permutexvar_epi16((__m512i)(first | (first + 16u) << 16), words);
  }
  const auto rounded = [](Vec<float> v) BATCHOPS_INLINE_LAMBDA {
    const __m512i bits = _mm512_castps_si512(v.v);
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return (U)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  };
  U even = rounded(a.a), odd = rounded(a.b);
  if (_mm512_cmp_ps_mask(a.a.v, a.b.v, _CMP_UNORD_Q) != 0) [[unlikely]] {
    even = bf16_bits(a.a) << 16;
    odd = bf16_bits(a.b) << 16;
  }
  return _mm512_mask_mov_epi16((__m512i)(even >> 16), 0xaaaaaaaa, (__m512i)odd);
}
#endif

template <class T, class S>
BATCHOPS_INLINE void put(S* p, Pair<T> a, Two, bool past_cache) {
#if defined(BATCHOPS_ISA_AVX2)
  if constexpr (kSwapped<S>) {
    const __m256i words = pack(a);
    if (past_cache) {  // no more aligned than one vector needs it
      auto* const to = reinterpret_cast<__m128i*>(p);
      _mm_stream_si128(to, _mm256_castsi256_si128(words));
      _mm_stream_si128(to + 1, _mm256_extracti128_si256(words, 1));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    }
    return;
  }
#elif defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    const __m512i words = pack(a);
    if (past_cache) {  // no more aligned than one vector needs it
      auto* const to = reinterpret_cast<__m256i*>(p);
      _mm256_stream_si256(to, _mm512_castsi512_si256(words));
      _mm256_stream_si256(to + 1, _mm512_extracti64x4_epi64(words, 1));
    } else {
      _mm512_storeu_si512(p, words);
    }
    return;
  }
#endif
  put(p, a.a, All{}, past_cache);
  put(p + Vec<T>::kLanes, a.b, All{}, past_cache);
}

template <class T, class S>
BATCHOPS_INLINE void put(S* p, Pair<T> a, Rest part, bool past_cache) {
  constexpr int64_t L = Vec<T>::kLanes;
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    const auto first = static_cast<__mmask32>((uint64_t{1} << part.n) - 1);
    _mm512_mask_storeu_epi16(p, first, pack(a));
    return;
  }
#endif
  if constexpr (kSwapped<S>) {
    S elements[2 * L];
    put(elements, a, Two{}, false);
    for (int64_t i = 0; i < part.n; ++i) p[i] = elements[i];
  } else if (part.n < L) {
    store(p, a.a, part.n);
  } else {
    put(p, a.a, All{}, past_cache);
    store(p + L, a.b, part.n - L);
  }
}

// As prefetch(), for all that an access by pairs will take there.
template <class T, class S>
BATCHOPS_INLINE void prefetch_pair(const S* p, int64_t offset) {
  for (int i = 0; i < 2 * Vec<T>::kLanes; i += 64 / sizeof(S)) prefetch(p, offset + i);
}

// As prefetch_pair(), for the lanes that will be read `ahead` elements on.
template <class T, class S, class Lanes>
BATCHOPS_INLINE void prefetch_ahead(const S* p, int64_t offset, Lanes, int64_t ahead = kAhead<S>) {
  offset += ahead;
  if constexpr (std::is_same_v<Lanes, Two> || std::is_same_v<Lanes, Rest>) {
    prefetch_pair<T>(p, offset);
  } else {
    prefetch(p, offset);
  }
}

// ------------------------------------------------------------------------- values for elements

// An array of T has a value for each of a run of elements of S, and room for a pair past the end.
// It is in the elements' order or, after in_pair_order(), as pairs have them.

// From the elements' order to a pair's.
template <class S, class T>
BATCHOPS_INLINE Vec<T> pair_order(Vec<T> a) {
  return a;
}
template <class S, class T>
BATCHOPS_INLINE Pair<T> pair_order(Pair<T> a) {
#if defined(BATCHOPS_ISA_AVX2)
  if constexpr (kSwapped<S>) {
    return {_mm256_permute2f128_ps(a.a.v, a.b.v, 0x20), _mm256_permute2f128_ps(a.a.v, a.b.v, 0x31)};
  }
#elif defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    const auto even =
        (__m512i)(Native<float>::U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 2u);
    return {_mm512_permutex2var_ps(a.a.v, even, a.b.v),
            _mm512_permutex2var_ps(a.a.v, (__m512i)((Native<float>::U)even + 1u), a.b.v)};
  }
#endif
  return a;
}
// And back.
template <class S, class T>
BATCHOPS_INLINE Vec<T> element_order(Vec<T> a) {
  return a;
}
template <class S, class T>
BATCHOPS_INLINE Pair<T> element_order(Pair<T> a) {
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    const Native<float>::U low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    return {_mm512_permutex2var_ps(a.a.v, (__m512i)low, a.b.v),
            _mm512_permutex2var_ps(a.a.v, (__m512i)(low + 8u), a.b.v)};
  }
#endif
  return pair_order<S>(a);
}
template <class T>
BATCHOPS_INLINE Pair<T> load_pair(const T* p) {
  return load<T>(p, Two{});
}
template <class T>
BATCHOPS_INLINE void store_pair(T* p, Pair<T> a) {
  put(p, a, Two{}, false);
}
template <class T>
BATCHOPS_INLINE void store_whole(T* p, Vec<T> a) {
  store(p, a);
}
template <class T>
BATCHOPS_INLINE void store_whole(T* p, Pair<T> a) {
  store_pair(p, a);
}
// The values of all that an access may take.
template <class T, class Lanes>
BATCHOPS_INLINE auto load_whole(const T* p, Lanes) {
  if constexpr (std::is_same_v<Lanes, Two> || std::is_same_v<Lanes, Rest>) {
    return load_pair(p);
  } else {
    return load<T>(p);
  }
}
template <class S, class T>
BATCHOPS_NOINLINE void in_pair_order(T* values, int64_t width) {
  if constexpr (kSwapped<S>) {
    for (int64_t j = 0; j < width; j += 2 * Vec<T>::kLanes) {
      store_pair(values + j, pair_order<S>(load_pair(values + j)));
    }
  }
}
template <class S, class T>
BATCHOPS_NOINLINE void in_element_order(T* values, int64_t width) {
  if constexpr (kSwapped<S>) {
    for (int64_t j = 0; j < width; j += 2 * Vec<T>::kLanes) {
      store_pair(values + j, element_order<S>(load_pair(values + j)));
    }
  }
}

// Zero where the element is not one of the first n.
template <class S, class T>
BATCHOPS_INLINE Pair<T> keep_first(int64_t n, Pair<T> a) {
  const auto first = [](int64_t k) { return (uint64_t{1} << k) - 1; };
#if defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) return {keep(first((n + 1) / 2), a.a), keep(first(n / 2), a.b)};
#endif
  const Pair<T> in_order = element_order<S>(a);
  return pair_order<S>(
      Pair<T>(keep(first(n), in_order.a), keep(first(n) >> Vec<T>::kLanes, in_order.b)));
}

template <class T>
BATCHOPS_INLINE double sum(Pair<T> a) {
  return sum(a.a + a.b);
}

// --------------------------------------------------------------------------------- mask bits

#if defined(BATCHOPS_ISA_AVX512)
constexpr uint64_t kEvenBits = 0x55555555;  // of a pair
#endif

// Bit i is set where element i is not <= 0.
template <class S, class T>
BATCHOPS_INLINE uint64_t positive_bits_of(Pair<T> a) {
#if defined(BATCHOPS_ISA_AVX2)
  if constexpr (kSwapped<S>) {
    const __m256 zero = _mm256_setzero_ps();
    const __m256i words =
        _mm256_packs_epi32(_mm256_castps_si256(_mm256_cmp_ps(a.a.v, zero, _CMP_NLE_UQ)),
                           _mm256_castps_si256(_mm256_cmp_ps(a.b.v, zero, _CMP_NLE_UQ)));
    return static_cast<uint32_t>(_mm_movemask_epi8(
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1))));
  }
#elif defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    return _pdep_u64(positive_bits(a.a), kEvenBits) | _pdep_u64(positive_bits(a.b), 2 * kEvenBits);
  }
#endif
  return positive_bits(a.a) | positive_bits(a.b) << Vec<T>::kLanes;
}

#if defined(BATCHOPS_ISA_AVX2)
// The bits of a pair in memory's order, and which of them are a vector's.
struct SwappedBits {
  uint64_t bits;
  Native<float>::U lanes;
};
BATCHOPS_INLINE Vec<float> select_bits(SwappedBits from, Vec<float> yes, Vec<float> no) {
  const Native<float>::U all = Native<float>::U{} + static_cast<uint32_t>(from.bits);
  return ((all & from.lanes) == from.lanes) ? yes.v : no.v;
}
#endif
// dy · activation'(z) of the pair that is number u of those whose bits these are.
template <class S, class Act, class T>
BATCHOPS_INLINE Pair<T> derivative_of_bits(const Act& act, Pair<T> dy, uint64_t bits, int u) {
  constexpr int L = Vec<T>::kLanes;
#if defined(BATCHOPS_ISA_AVX2)
  if constexpr (kSwapped<S>) {
    using U = Native<float>::U;
    const U first = U{1, 2, 4, 8, 1 << 8, 1 << 9, 1 << 10, 1 << 11} << (2 * L * u);
    return {act.backward_bits(dy.a, SwappedBits{bits, first}),
            act.backward_bits(dy.b, SwappedBits{bits, first << 4})};
  }
#elif defined(BATCHOPS_ISA_AVX512)
  if constexpr (kSwapped<S>) {
    bits >>= 2 * L * u;
    return {act.backward_bits(dy.a, _pext_u64(bits, kEvenBits)),
            act.backward_bits(dy.b, _pext_u64(bits, 2 * kEvenBits))};
  }
#endif
  bits >>= 2 * L * u;
  return {act.backward_bits(dy.a, bits), act.backward_bits(dy.b, bits >> L)};
}
template <class Act, class T>
BATCHOPS_INLINE Pair<T> mask_source(const Act& act, Pair<T> z) {
  return {act.mask_source(z.a), act.mask_source(z.b)};
}

// Calls vector(j, lanes, u) over [from, n), u counting 0…kUnroll - 1.
template <class T, int kUnroll = 1, class Vector>
BATCHOPS_INLINE void for_pairs(int64_t from, int64_t n, Vector&& vector) {
  constexpr int64_t kWidth = 2 * Vec<T>::kLanes;
  int64_t j = from;
  if constexpr (kUnroll == 2) {
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
      vector(j, Two{}, 0);
      vector(j + kWidth, Two{}, 1);
    }
  }
  for (; j + kWidth <= n; j += kWidth) vector(j, Two{}, 0);
  if (j < n) vector(j, Rest{n - j}, 0);
}

// Calls pair(j, lanes, u) over [from, n), u being 0 or 1 within a block of two, and
// begin(j, bytes) / end(j, bytes) around each block with the number of mask bytes it covers.
template <class T, class Begin, class Body, class End>
BATCHOPS_INLINE void for_pair_blocks(int64_t from, int64_t n, Begin&& begin, Body&& pair,
                                     End&& end) {
  constexpr int64_t kWidth = 2 * Vec<T>::kLanes;
  constexpr std::integral_constant<int, 2 * kWidth / 8> kBytes;
  int64_t j = from;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    begin(j, kBytes);
    pair(j, Two{}, 0);
    pair(j + kWidth, Two{}, 1);
    end(j, kBytes);
  }
  if (j == n) return;
  const int64_t start = j;
  const int bytes = static_cast<int>((n - j + 7) / 8);
  begin(start, bytes);
  int u = 0;
  if (j + kWidth <= n) {
    pair(j, Two{}, u++);
    j += kWidth;
  }
  if (j < n) pair(j, Rest{n - j}, u);
  end(start, bytes);
}
// The same without a mask.
template <class T, class Body>
BATCHOPS_INLINE void for_pair_blocks(int64_t from, int64_t n, Body&& pair) {
  for_pair_blocks<T>(from, n, [](int64_t, auto) {}, pair, [](int64_t, auto) {});
}
