#include "collate/normalize_task.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "collate/copy.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define BATCHOPS_COLLATE_AVX2 1
#define BATCHOPS_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace batchops::collate {
namespace {

constexpr int64_t kChunkPixels = 16 << 10;
constexpr int64_t kLanes = 8;

// --- one value at a time -------------------------------------------------------------------------

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Finite values only: what comes of bytes with finite scales.
uint16_t to_fp16(float x) {
  const uint32_t bits = bits_of(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to inf
  if (magnitude < 0x38800000) {
    // Subnormal in fp16: the addition shifts the value into the lowest bits and rounds it.
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    return static_cast<uint16_t>(sign | (bits_of(shifted + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

template <FloatType Type>
void put(std::byte* out, int64_t i, float x) {
  if constexpr (Type == FloatType::fp32) {
    std::memcpy(out + i * 4, &x, 4);
  } else {
    const uint16_t narrow = Type == FloatType::bf16 ? to_bf16(x) : to_fp16(x);
    std::memcpy(out + i * 2, &narrow, 2);
  }
}

template <FloatType Type>
void scalar(const uint8_t* in, int64_t in_step, std::byte* out, int64_t out_step, int64_t count,
            float scale, float shift) {
  for (int64_t i = 0; i < count; ++i) {
    put<Type>(out, i * out_step, std::fma(static_cast<float>(in[i * in_step]), scale, shift));
  }
}

// --- AVX2 ----------------------------------------------------------------------------------------

#if defined(BATCHOPS_COLLATE_AVX2)

bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}

BATCHOPS_AVX2 inline __m128i bf16_of(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// Eight values at `out`, which may lie anywhere unless they are streamed.
template <FloatType Type, bool Streaming>
BATCHOPS_AVX2 inline void put8(std::byte* out, __m256 x) {
  if constexpr (Type == FloatType::fp32) {
    if constexpr (Streaming) {
      _mm256_stream_ps(reinterpret_cast<float*>(out), x);
    } else {
      _mm256_storeu_ps(reinterpret_cast<float*>(out), x);
    }
  } else {
    const __m128i narrow =
        Type == FloatType::bf16 ? bf16_of(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    if constexpr (Streaming) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out), narrow);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow);
    }
  }
}

BATCHOPS_AVX2 inline __m256 scaled(__m128i bytes, __m256 scale, __m256 shift) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), scale, shift);
}

// One channel of sixteen pixels of three: 48 bytes to 16.
template <int Channel>
BATCHOPS_AVX2 inline __m128i pick3(const uint8_t* in) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16));
  const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 32));
  const auto pick = [](__m128i x, auto... index) BATCHOPS_AVX2 {
    return _mm_shuffle_epi8(x, _mm_setr_epi8(static_cast<char>(index)...));
  };
  constexpr int o = -1;  // leaves a zero
  __m128i x, y, z;
  if constexpr (Channel == 0) {
    x = pick(a, 0, 3, 6, 9, 12, 15, o, o, o, o, o, o, o, o, o, o);
    y = pick(b, o, o, o, o, o, o, 2, 5, 8, 11, 14, o, o, o, o, o);
    z = pick(d, o, o, o, o, o, o, o, o, o, o, o, 1, 4, 7, 10, 13);
  } else if constexpr (Channel == 1) {
    x = pick(a, 1, 4, 7, 10, 13, o, o, o, o, o, o, o, o, o, o, o);
    y = pick(b, o, o, o, o, o, 0, 3, 6, 9, 12, 15, o, o, o, o, o);
    z = pick(d, o, o, o, o, o, o, o, o, o, o, o, 2, 5, 8, 11, 14);
  } else {
    x = pick(a, 2, 5, 8, 11, 14, o, o, o, o, o, o, o, o, o, o, o);
    y = pick(b, o, o, o, o, o, 1, 4, 7, 10, 13, o, o, o, o, o, o);
    z = pick(d, o, o, o, o, o, o, o, o, o, o, 0, 3, 6, 9, 12, 15);
  }
  return _mm_or_si128(_mm_or_si128(x, y), z);
}

template <FloatType Type, bool Streaming, int Channel>
BATCHOPS_AVX2 void plane3(const uint8_t* in, std::byte* out, int64_t count, float scale,
                          float shift) {
  constexpr int64_t kItem = Type == FloatType::fp32 ? 4 : 2;
  const __m256 a = _mm256_set1_ps(scale);
  const __m256 b = _mm256_set1_ps(shift);
  for (int64_t i = 0; i < count; i += 16) {
    const __m128i bytes = pick3<Channel>(in + 3 * i);
    put8<Type, Streaming>(out + i * kItem, scaled(bytes, a, b));
    put8<Type, Streaming>(out + (i + 8) * kItem, scaled(_mm_srli_si128(bytes, 8), a, b));
  }
}

// Pixels [0, returned) of three interleaved channels to three planes `plane` bytes apart. A block
// of pixels stays in the first cache while it is read for each plane, so that each is written in
// long runs: memory takes those faster than three streams of a line each.
template <FloatType Type, bool Streaming>
BATCHOPS_AVX2 int64_t planar3(const uint8_t* in, std::byte* out, int64_t plane, int64_t count,
                              const float* scale, const float* shift) {
  constexpr int64_t kItem = Type == FloatType::fp32 ? 4 : 2;
  constexpr int64_t kBlock = 2048;
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += kBlock) {
    const int64_t n = std::min(kBlock, whole - i);
    const uint8_t* const from = in + 3 * i;
    std::byte* const to = out + i * kItem;
    plane3<Type, Streaming, 0>(from, to, n, scale[0], shift[0]);
    plane3<Type, Streaming, 1>(from, to + plane, n, scale[1], shift[1]);
    plane3<Type, Streaming, 2>(from, to + 2 * plane, n, scale[2], shift[2]);
  }
  return whole;
}

// in[i] · scale[i mod period] + shift[i mod period]; the tables hold 8 · period values.
template <FloatType Type, bool Streaming>
BATCHOPS_AVX2 int64_t linear(const uint8_t* in, std::byte* out, int64_t count, int64_t period,
                             const float* scale, const float* shift) {
  constexpr int64_t kItem = Type == FloatType::fp32 ? 4 : 2;
  const int64_t block = kLanes * period;
  int64_t i = 0;
  for (; i + block <= count; i += block) {
    for (int64_t k = 0; k < block; k += kLanes) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i + k));
      put8<Type, Streaming>(out + (i + k) * kItem,
                            scaled(bytes, _mm256_loadu_ps(scale + k), _mm256_loadu_ps(shift + k)));
    }
  }
  return i;
}

template <FloatType Type>
constexpr int64_t kVectorBytes = Type == FloatType::fp32 ? 32 : 16;

template <FloatType Type>
bool aligned(const std::byte* out, int64_t stride) {
  return reinterpret_cast<uintptr_t>(out) % kVectorBytes<Type> == 0 &&
         stride % kVectorBytes<Type> == 0;
}

#endif

struct Part {
  const uint8_t* in;    // the first pixel, in its channel 0
  std::byte* out;       // where the first pixel of channel 0 goes
  int64_t count;        // pixels
  const float* scales;  // tables of 8 · channels values
  const float* shifts;
  bool streaming;
};

template <FloatType Type>
void convert(const Pixels& p, const Part& part) {
  constexpr int64_t kItem = Type == FloatType::fp32 ? 4 : 2;
  const int64_t C = p.channels;
  // Bytes of channels that lie side by side are one run with a period.
  const bool interleaved = p.channels_last_in && (p.channels_last_out || C == 1);
  int64_t done = 0;
  if (interleaved) {
    const int64_t n = part.count * C;
#if defined(BATCHOPS_COLLATE_AVX2)
    if (has_avx2()) {
      done = part.streaming && aligned<Type>(part.out, 0)
                 ? linear<Type, true>(part.in, part.out, n, C, part.scales, part.shifts)
                 : linear<Type, false>(part.in, part.out, n, C, part.scales, part.shifts);
    }
#endif
    for (; done < n; ++done) {
      const auto c = static_cast<size_t>(done % C);
      put<Type>(part.out, done,
                std::fma(static_cast<float>(part.in[done]), p.scale[c], p.shift[c]));
    }
    return;
  }
  const int64_t plane = p.pixels * kItem;
#if defined(BATCHOPS_COLLATE_AVX2)
  if (has_avx2() && C == 3 && p.channels_last_in) {
    done = part.streaming && aligned<Type>(part.out, plane)
               ? planar3<Type, true>(part.in, part.out, plane, part.count, p.scale.data(),
                                     p.shift.data())
               : planar3<Type, false>(part.in, part.out, plane, part.count, p.scale.data(),
                                      p.shift.data());
  }
#endif
  for (int64_t c = 0; c < C; ++c) {
    const float a = p.scale[static_cast<size_t>(c)];
    const float b = p.shift[static_cast<size_t>(c)];
    const int64_t in_step = p.channels_last_in ? C : 1;
    const int64_t out_step = p.channels_last_out ? C : 1;
    const uint8_t* in = part.in + (p.channels_last_in ? c : c * p.pixels) + done * in_step;
    std::byte* out =
        part.out + (p.channels_last_out ? c * kItem : c * plane) + done * out_step * kItem;
    int64_t count = part.count - done;
#if defined(BATCHOPS_COLLATE_AVX2)
    if (has_avx2() && in_step == 1 && out_step == 1) {
      float as[kLanes];
      float bs[kLanes];
      std::fill_n(as, kLanes, a);
      std::fill_n(bs, kLanes, b);
      const int64_t fast = part.streaming && aligned<Type>(out, 0)
                               ? linear<Type, true>(in, out, count, 1, as, bs)
                               : linear<Type, false>(in, out, count, 1, as, bs);
      in += fast;
      out += fast * kItem;
      count -= fast;
    }
#endif
    scalar<Type>(in, in_step, out, out_step, count, a, b);
  }
}

}  // namespace

std::shared_ptr<NormalizeTask> NormalizeTask::make(std::shared_ptr<const Blocks> blocks,
                                                   Pixels pixels, std::byte* out, int max_threads) {
  const int64_t step =
      std::max<int64_t>(16, kChunkPixels * 3 / std::max<int64_t>(pixels.channels, 1) / 16 * 16);
  const int64_t parts = (pixels.pixels + step - 1) / step;
  const int64_t item = pixels.type == FloatType::fp32 ? 4 : 2;
  const int64_t bytes = blocks->total_bytes() * item;
  return std::shared_ptr<NormalizeTask>(new NormalizeTask(std::move(blocks), std::move(pixels), out,
                                                          step, parts, bytes, max_threads));
}

NormalizeTask::NormalizeTask(std::shared_ptr<const Blocks> blocks, Pixels pixels, std::byte* out,
                             int64_t step, int64_t parts, int64_t bytes, int max_threads)
    : Task(blocks->count() * parts, max_threads),
      blocks_(std::move(blocks)),
      pixels_(std::move(pixels)),
      out_(out),
      step_(step),
      parts_(parts),
      bytes_(bytes) {
  for (int64_t i = 0; i < kLanes * pixels_.channels; ++i) {
    scales_.push_back(pixels_.scale[static_cast<size_t>(i % pixels_.channels)]);
    shifts_.push_back(pixels_.shift[static_cast<size_t>(i % pixels_.channels)]);
  }
}

void NormalizeTask::run(int64_t chunk) noexcept {
  const int64_t sample = chunk / parts_;
  const int64_t first = chunk % parts_ * step_;
  const int64_t C = pixels_.channels;
  const int64_t item = pixels_.type == FloatType::fp32 ? 4 : 2;
  Part part;
  part.in = reinterpret_cast<const uint8_t*>(blocks_->data[static_cast<size_t>(sample)]) +
            first * (pixels_.channels_last_in ? C : 1);
  part.out =
      out_ + (sample * pixels_.pixels * C + first * (pixels_.channels_last_out ? C : 1)) * item;
  part.count = std::min(step_, pixels_.pixels - first);
  part.scales = scales_.data();
  part.shifts = shifts_.data();
  part.streaming = bytes_ >= kStreamingBytes;
  switch (pixels_.type) {
    case FloatType::fp32:
      convert<FloatType::fp32>(pixels_, part);
      break;
    case FloatType::bf16:
      convert<FloatType::bf16>(pixels_, part);
      break;
    case FloatType::fp16:
      convert<FloatType::fp16>(pixels_, part);
      break;
  }
  if (part.streaming) streaming_fence();
}

}  // namespace batchops::collate
