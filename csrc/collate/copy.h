// Copies past the caches, for outputs that would only evict what is there.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace batchops::collate {

// From here on a batch would not be in the cache any more when it is used, and a plain store reads
// each line before writing it.
constexpr int64_t kStreamingBytes = int64_t{8} << 20;

#if defined(__SSE2__)
// Whole lines; the source is asked for ahead, past the end of a page, where the hardware stops.
inline void copy_streaming(std::byte* out, const std::byte* in, size_t bytes) {
  const size_t head = std::min(bytes, (64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63);
  std::memcpy(out, in, head);
  out += head;
  in += head;
  bytes -= head;
  constexpr size_t kAhead = 1024;
  for (; bytes >= 64; bytes -= 64, out += 64, in += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(in) + kAhead, _MM_HINT_NTA);
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 32));
    const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + 48), d);
  }
  std::memcpy(out, in, bytes);
}
// Streamed stores are not ordered with the flag that says that they are done.
inline void streaming_fence() { _mm_sfence(); }
#else
inline void copy_streaming(std::byte* out, const std::byte* in, size_t bytes) {
  std::memcpy(out, in, bytes);
}
inline void streaming_fence() {}
#endif

}  // namespace batchops::collate
