// Elements in memory and floats in registers: wide loads and stores of W consecutive elements, and
// single elements whose dtype is known at run time only.
//
//   float v[W];
//   Unit<T, W> raw = load_unit<T, W>(x + offset);   // one access of W · sizeof(T) ≤ 16 bytes
//   to_float<T, W>(raw, v);  …  store_unit<T, W>(y + offset, v);
//
// Loads are kept apart from conversions so that several can be in flight before the first is used.
#pragma once
#include <cstring>

#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// The bits of W elements of T as one machine word, loaded and stored by one instruction.
template <class T, int W>
struct Unit {
  static_assert(W == 1 || W % 2 == 0);
  static constexpr int kBytes = W * static_cast<int>(sizeof(T));
  typename Word<kBytes>::type bits;
};

// Elements a 16-byte access holds.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// `from` must be aligned to the unit. Null pointers are not looked through.
template <class T, int W>
BATCHOPS_DEVICE Unit<T, W> load_unit(const T* from) {
  return {*reinterpret_cast<const typename Word<Unit<T, W>::kBytes>::type*>(from)};
}

template <class T, int W>
BATCHOPS_DEVICE Unit<T, W> zero_unit() {
  Unit<T, W> unit;
  unit.bits = {};
  return unit;
}

// Elements kPart · i … of a unit.
template <int kPart, class T, int W>
BATCHOPS_DEVICE Unit<T, kPart> part_of(const Unit<T, W>& unit, int i) {
  T elements[W];
  memcpy(static_cast<void*>(elements), &unit.bits, sizeof elements);
  Unit<T, kPart> part;
  memcpy(&part.bits, elements + i * kPart, sizeof part.bits);
  return part;
}

template <class T, int W>
BATCHOPS_DEVICE void to_float(const Unit<T, W>& unit, float (&to)[W]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && W % 2 == 0) {
    // The upper half is a float but for its lower bits: one instruction each.
    uint32_t words[W / 2];
    memcpy(static_cast<void*>(words), &unit.bits, sizeof words);
#pragma unroll
    for (int j = 0; j < W / 2; ++j) {
      const uint32_t low = words[j] << 16, high = words[j] & 0xffff0000u;
      memcpy(&to[2 * j], &low, sizeof low);
      memcpy(&to[2 * j + 1], &high, sizeof high);
    }
    return;
  }
  T elements[W];
  memcpy(static_cast<void*>(elements), &unit.bits, sizeof elements);
#pragma unroll
  for (int j = 0; j < W; ++j) to[j] = static_cast<float>(elements[j]);
}

template <class T>
BATCHOPS_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

// To global memory. An assignment of 16 or 8 bytes is one instruction for small words, but the
// compiler may split it where it knows the floats apart (it does for sm_75 to sm_90).
template <class Word>
BATCHOPS_DEVICE void store_word(Word* to, const Word& word) {
#ifndef BATCHOPS_CUDA_EMULATOR
  if constexpr (std::is_same_v<Word, uint4> || std::is_same_v<Word, uint2>) {
    __stwb(to, word);
    return;
  }
#endif
  *to = word;
}

// Of what nobody needs again soon: its line is the first to leave the L2 cache.
struct Once {};

template <class T, int W>
BATCHOPS_DEVICE Unit<T, W> load_unit(const T* from, Once) {
#ifdef BATCHOPS_CUDA_EMULATOR
  return load_unit<T, W>(from);
#else
  return {__ldcs(reinterpret_cast<const typename Word<Unit<T, W>::kBytes>::type*>(from))};
#endif
}
template <class Word>
BATCHOPS_DEVICE void store_word(Word* to, const Word& word, Once) {
#ifdef BATCHOPS_CUDA_EMULATOR
  *to = word;
#else
  __stcs(to, word);
#endif
}

// The same, if it is `once` that it is needed.
struct L2Policy {
#if defined(BATCHOPS_CUDA_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
  BATCHOPS_DEVICE explicit L2Policy(bool) {}
#else
  uint64_t bits;

  BATCHOPS_DEVICE explicit L2Policy(bool once) {
    if (once) {
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(bits));
    } else {
      asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(bits));
    }
  }
#endif
};

template <class Word>
BATCHOPS_DEVICE void store_word(Word* to, const Word& word, L2Policy policy) {
#if defined(BATCHOPS_CUDA_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
  static_cast<void>(policy);
  store_word(to, word);
#else
  const size_t place = __cvta_generic_to_global(to);
  if constexpr (std::is_same_v<Word, uint4>) {
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;"
                 :
                 : "l"(place), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "l"(policy.bits)
                 : "memory");
  } else if constexpr (std::is_same_v<Word, uint2>) {
    asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;"
                 :
                 : "l"(place), "r"(word.x), "r"(word.y), "l"(policy.bits)
                 : "memory");
  } else {
    *to = word;
  }
#endif
}

// Floats to shared memory.
template <int W>
BATCHOPS_DEVICE void keep_floats(float* to, const float (&from)[W]) {
  if constexpr (W == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else if constexpr (W == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  } else {
    static_assert(W == 1);
    *to = from[0];
  }
}

// Two at once: one instruction, where each by itself takes one and another to put them together.
BATCHOPS_DEVICE __half2 pair_from_float(__half, float first, float second) {
  return __floats2half2_rn(first, second);
}
BATCHOPS_DEVICE __nv_bfloat162 pair_from_float(__nv_bfloat16, float first, float second) {
  return __floats2bfloat162_rn(first, second);
}

// With a policy for the L2 cache, if any.
template <class T, int W, class... Policy>
BATCHOPS_DEVICE void store_unit(T* to, const float (&from)[W], Policy... policy) {
  alignas(16) T elements[W];
  if constexpr (sizeof(T) == 2 && W % 2 == 0) {
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const auto pair = pair_from_float(T{}, from[j], from[j + 1]);
      memcpy(static_cast<void*>(elements + j), &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) elements[j] = from_float<T>(from[j]);
  }
  using Bits = typename Word<Unit<T, W>::kBytes>::type;
  Bits bits;
  memcpy(&bits, elements, sizeof bits);
  store_word(reinterpret_cast<Bits*>(to), bits, policy...);
}

// Per-channel values (weights, running statistics): few, so their dtype is a run-time switch rather
// than a template argument.
BATCHOPS_DEVICE double load_as_double(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16:
      return __half2float(static_cast<const __half*>(data)[i]);
    case DType::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f64:
      return static_cast<const double*>(data)[i];
    default:
      return static_cast<const float*>(data)[i];
  }
}

BATCHOPS_DEVICE float load_as_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16:
      return __half2float(static_cast<const __half*>(data)[i]);
    case DType::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

BATCHOPS_DEVICE void store_as(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f16:
      static_cast<__half*>(data)[i] = __float2half_rn(static_cast<float>(value));
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(static_cast<float>(value));
      break;
    case DType::f64:
      static_cast<double*>(data)[i] = value;
      break;
    default:
      static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// Calls f(TypeIs<T>{}) with the element type of a floating dtype CUDA kernels take.
template <class F>
const char* dispatch_dtype(const char* operation, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(TypeIs<float>{});
    case DType::f16:
      return f(TypeIs<__half>{});
    case DType::bf16:
      return f(TypeIs<__nv_bfloat16>{});
    default:
      return message("%s: no CUDA kernel for float64; expected float32, float16 or bfloat16",
                     operation);
  }
}

}  // namespace batchops::cuda
