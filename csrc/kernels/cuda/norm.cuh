// What batch norm and group norm share: units of work, the arithmetic of a channel that forward and
// backward must do alike, the mask, statistics of parts and their merging, and clusters.
#pragma once
#include <initializer_list>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/fast_divide.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"
#if BATCHOPS_HAS_CLUSTERS
#include <cooperative_groups.h>
#endif

namespace batchops::cuda {

constexpr int kThreads = 256;
constexpr int kLeastResident = 2;        // blocks on a multiprocessor: up to 128 registers a thread
constexpr int kInFlight = 4;             // units a thread takes at once
constexpr int64_t kPiecesWanted = 1024;  // about a wave of blocks on the largest GPUs
constexpr int kMostCluster = 8;          // blocks: what every device with clusters can place

template <class T>
__host__ __device__ constexpr T ceil_divide(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_divide(a, b) * b;
}
template <class T>
__host__ __device__ constexpr T clamp(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}

// ---- host

// Blocks for `pieces` of work; a block takes every gridDim.x-th piece.
inline const char* grid_size(const char* operation, int device, int64_t pieces, int64_t& blocks) {
  constexpr int64_t kBlocksPerMultiprocessor = 64;  // 8 fit at once: the last wave stays short
  Device found;
  const char* error = query(operation, device, found);
  blocks = clamp<int64_t>(pieces, 1, kBlocksPerMultiprocessor * found.multiprocessors);
  return error;
}

template <class F>
const char* dispatch_layout(Layout layout, F&& f) {
  if (layout == Layout::channels_first) {
    return f(std::integral_constant<Layout, Layout::channels_first>{});
  }
  return f(std::integral_constant<Layout, Layout::channels_last>{});
}

// The same number, of which the compiler knows nothing: what follows from it is worked out again
// rather than kept in registers through other work.
template <class T>
BATCHOPS_DEVICE T forgotten(T number) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(number));
  } else {
    asm volatile("" : "+r"(number));
  }
#endif
  return number;
}

// ---- the arithmetic of a channel

// z = (x - mean) · scale + shift. Forward and backward must find the same z to the last bit, so
// the roundings are spelled out: no compiler may contract them one way here and another there.
struct Affine {
  float mean, scale, shift;

  BATCHOPS_DEVICE float centred(float x) const { return __fsub_rn(x, mean); }
  BATCHOPS_DEVICE float scaled(float of) const { return __fmaf_rn(of, scale, shift); }
  BATCHOPS_DEVICE float operator()(float x) const { return scaled(centred(x)); }
  // The shift where x is not centred.
  BATCHOPS_DEVICE float shift_of_x() const { return __fmaf_rn(-mean, scale, shift); }
};

// The low part of the mean goes into the shift.
BATCHOPS_DEVICE Affine make_affine(float mean, float mean_low, float rstd, float weight,
                                   float bias) {
  const float scale = __fmul_rn(rstd, weight);
  return {mean, scale, __fmaf_rn(-mean_low, scale, bias)};
}

// bfloat16 cannot hold a mean so far from its deviation that x must be centred before it is scaled:
// its coefficients are folded, for an instruction less an element and a register less a column.
template <class T>
constexpr bool kFolded = std::is_same_v<T, __nv_bfloat16>;
constexpr bool is_folded(DType dtype) { return dtype == DType::bf16; }

// As elements of T take it; where it is folded, `mean` is not for them.
template <class T>
struct AffineOf : Affine {
  AffineOf() = default;
  BATCHOPS_DEVICE explicit AffineOf(const Affine& a) : Affine(a) {
    if (kFolded<T>) shift = shift_of_x();
  }
  // What is scaled.
  BATCHOPS_DEVICE float centred(float x) const { return kFolded<T> ? x : Affine::centred(x); }
  BATCHOPS_DEVICE float operator()(float x) const { return scaled(centred(x)); }
};

// ---- statistics

// 1 / n and 1 / √a to 2^-44: Newton's step from float's estimate, where a division and a root in
// double take three times as long, and a statistic waits for several.
BATCHOPS_DEVICE double inverse(double n) {
  const double estimate = inverse_fast(static_cast<float>(n));
  return ::fma(estimate, ::fma(-n, estimate, 1.0), estimate);
}
BATCHOPS_DEVICE double inverse_root(double a) {
  if (!(a > 1e-30 && a < 1e30)) return 1.0 / ::sqrt(a);  // also of NaN
#ifdef BATCHOPS_CUDA_EMULATOR
  const double estimate = 1.0f / ::sqrtf(static_cast<float>(a));
#else
  const double estimate = ::rsqrtf(static_cast<float>(a));
#endif
  return ::fma(0.5 * estimate, ::fma(-a * estimate, estimate, 1.0), estimate);
}

// Statistics of a part, around a shift that lies among its values, so that neither sum cancels.
struct alignas(16) Moments {
  float shift;
  float sum;     // Σ (x - shift)
  float square;  // Σ (x - shift)² - sum² / count
  float count;
};

struct MeanAndVariance {
  double mean, square;  // Σ (x - mean)²
};

// Parts merged in double around the first one's mean g, as seen by one of `lanes` lanes:
//   mean = g + Σ n_k d_k / M,  Σ (x - mean)² = Σ (square_k + n_k d_k²) - (Σ n_k d_k)² / M
// where d_k = mean_k - g. reduce() adds over the lanes. Any part but the first may be empty.
template <class Get, class Reduce>
BATCHOPS_DEVICE MeanAndVariance merge(int64_t M, int64_t count, int lane, int lanes, Get get,
                                      Reduce reduce) {
  const Moments first = get(int64_t{0});
  const double g =
      static_cast<double>(first.shift) + static_cast<double>(first.sum) * inverse(first.count);
  double sum = 0.0;
  double square = 0.0;
  for (int64_t k = lane; k < count; k += lanes) {
    const Moments m = get(k);
    if (m.count == 0.0f) continue;
    const double n = m.count;
    const double nd = n * (m.shift - g) + m.sum;
    sum += nd;
    square += m.square + nd * nd * inverse(n);
  }
  sum = reduce(sum);
  square = reduce(square);
  const double part = inverse(static_cast<double>(M));
  const double rest = square - sum * sum * part;
  return {g + sum * part, rest < 0.0 ? 0.0 : rest};  // a NaN stays
}

// ---- the mask: bit i % 8 of byte i / 8 of a padded row belongs to element i

// Where a unit lies: element `offset` of the tensor, elements column … column + W - 1 of its row.
struct Place {
  int64_t offset;
  int64_t row;
  int64_t column;
  bool valid;
};

inline int64_t mask_row_bytes(int64_t row) { return ceil_divide<int64_t>(row, 8); }

// Writes a byte of the mask from its neighbours' bits. All lanes of the warp must call it, those
// without an element too (with bits = 0); the lanes of one byte are neighbours and `writes` is set
// in the first of them.
template <int W>
BATCHOPS_DEVICE void store_mask_byte(uint8_t* to, bool writes, unsigned bits) {
  if constexpr (W == 4) {
    bits |= __shfl_down_sync(kAllLanes, bits, 1) << 4;
  } else if constexpr (W == 1) {
    bits = __ballot_sync(kAllLanes, static_cast<int>(bits)) >> (threadIdx.x % kWarp);
  }
  if (writes) *to = static_cast<uint8_t>(bits);
}

// ---- clusters

BATCHOPS_DEVICE void cluster_sync() {
#if BATCHOPS_HAS_CLUSTERS
  cooperative_groups::this_cluster().sync();
#endif
}

BATCHOPS_DEVICE void cluster_arrive() {
#if BATCHOPS_HAS_CLUSTERS
  static_cast<void>(cooperative_groups::this_cluster().barrier_arrive());
#endif
}
BATCHOPS_DEVICE void cluster_wait() {
#if BATCHOPS_HAS_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
BATCHOPS_DEVICE T* of_rank(T* place, [[maybe_unused]] int rank) {
#if BATCHOPS_HAS_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(place, rank);
#else
  return place;
#endif
}

}  // namespace batchops::cuda
