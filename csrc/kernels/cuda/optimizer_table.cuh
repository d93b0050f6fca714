// The optimizers' tensors as kernels see them: a table in device memory, cut into items of work.
//
//   items   0 … chunks - 1    a chunk of a tensor, first those of the large tensors; a block's work
//           chunks …          kWarps small tensors, a warp's work each
#pragma once
#include "kernels/cuda/vector.cuh"
#include "kernels/multi_tensor.h"

namespace batchops::cuda::optimizer {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Elements of a unit, and units that a thread loads before it uses the first.
constexpr int kWidth = 4;
constexpr int kInFlight = 2;
// Elements of a chunk: what a block has in flight at once. Tensors up to kSmall, a warp's share of
// it, are not worth a block.
constexpr int kChunk = kThreads * kInFlight * kWidth;
constexpr int kSmall = kChunk / kWarps;
// Elements beyond which the blocks of most devices do not keep a tensor whole. Those come first, or
// one between them would have its outcome waited for as soon as its chunks are done.
constexpr int64_t kLarge = 1 << 20;

__host__ __device__ inline int32_t chunks_of(int64_t numel) {
  // Without a sign, as what is divided elsewhere too: then that is a shift.
  return static_cast<int32_t>((static_cast<uint64_t>(numel) + kChunk - 1) / kChunk);
}

struct Entry {
  void* p;
  const void* g;
  float* m;
  float* v;
  float* master;  // or null
  int64_t numel;
  int32_t first_chunk;      // of a small tensor, its place among the small ones
  int32_t set;              // see optimizer_sets
  int8_t p_dtype, g_dtype;  // DType
  int16_t wide;             // all of them aligned to kWidth elements
  int32_t rank;             // by first_chunk, among the tensors that have chunks

  BATCHOPS_DEVICE int32_t chunks() const { return chunks_of(numel); }
  BATCHOPS_DEVICE int32_t last_chunk() const { return first_chunk + chunks() - 1; }
};
static_assert(sizeof(Entry) == 64);
struct Row : Entry {
  float* step;  // or null
};
static_assert(sizeof(Row) == 72);

// How tensors come to items; the smalls and chunks are counted on the host.
struct Table {
  const Row* entries;        // [tensors]
  const int32_t* tensor_of;  // [chunks + smalls]
  int32_t tensors, chunks = 0, smalls = 0;

  Table() = default;
  Table(const OptimizerTensor* x, int64_t count, const void* table)
      : entries(static_cast<const Row*>(table)),
        tensor_of(reinterpret_cast<const int32_t*>(entries + count)),
        tensors(static_cast<int32_t>(count)) {
    for (int64_t i = 0; i < count; ++i) {
      if (x[i].numel <= kSmall) {
        ++smalls;
      } else {
        chunks += chunks_of(x[i].numel);
      }
    }
  }
  size_t bytes() const {
    return tensors * sizeof(Row) + (int64_t{chunks} + smalls) * sizeof(int32_t);
  }
  __host__ __device__ int32_t items() const { return chunks + (smalls + kWarps - 1) / kWarps; }
};

// Of an element, of a dtype that optimizers take.
BATCHOPS_DEVICE constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Elements of a tensor: its arrays from the first of them on.
struct Part {
  void* p;  // what the formulas take for it
  const void* g;
  float* m;
  float* v;
  void* copy;     // of p, which is a master, at low precision; or null
  int32_t units;  // of kWidth elements each
  int32_t rest;   // elements that come after them
  int8_t p_type, g_type, copy_type;
  int8_t kept;  // see Step

  Part() = default;
  // So many elements from `begin` on.
  BATCHOPS_DEVICE Part(const Entry& x, int64_t begin, int32_t count)
      : g(from(x.g, begin, x.g_dtype)),
        m(from(x.m, begin)),
        v(from(x.v, begin)),
        units(x.wide ? static_cast<int32_t>(count / unsigned{kWidth}) : 0),
        rest(count - units * kWidth),
        g_type(x.g_dtype),
        copy_type(x.p_dtype),
        kept(0) {
    const bool master = x.master != nullptr;
    void* const own = from(x.p, begin, x.p_dtype);
    p = master ? from(x.master, begin) : own;
    p_type = master ? static_cast<int8_t>(DType::f32) : x.p_dtype;
    copy = master ? own : nullptr;
  }
  // A chunk, or several from one on.
  BATCHOPS_DEVICE static Part of_chunks(const Entry& x, int32_t item, int32_t chunks = 1) {
    const int64_t begin = (item - x.first_chunk) * int64_t{kChunk};
    const int64_t left = x.numel - begin, most = int64_t{chunks} * kChunk;
    return Part(x, begin, static_cast<int32_t>(left < most ? left : most));
  }
  BATCHOPS_DEVICE static Part whole(const Entry& small) {
    return Part(small, 0, static_cast<int32_t>(small.numel));
  }

  BATCHOPS_DEVICE DType p_dtype() const { return static_cast<DType>(p_type); }
  BATCHOPS_DEVICE DType g_dtype() const { return static_cast<DType>(g_type); }
  BATCHOPS_DEVICE DType copy_dtype() const { return static_cast<DType>(copy_type); }

 private:
  template <class T>
  BATCHOPS_DEVICE static T* from(T* array, int64_t begin, int8_t dtype = 0) {
    static_assert(static_cast<int>(DType::f32) == 0);
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    auto* const bytes = reinterpret_cast<Byte*>(array);
    return array == nullptr
               ? nullptr
               : reinterpret_cast<T*>(bytes + begin * bytes_of(static_cast<DType>(dtype)));
  }
};

// Calls f(TypeIs<T>{}) for the dtype; the whole warp takes the same branch.
template <class Call>
BATCHOPS_DEVICE void with_element(DType dtype, Call&& f) {
  switch (dtype) {
    case DType::f16:
      return f(TypeIs<__half>{});
    case DType::bf16:
      return f(TypeIs<__nv_bfloat16>{});
    default:
      return f(TypeIs<float>{});
  }
}

// An element whose dtype is known at run time only.
struct Any {};
// What a register holds of an element in memory.
template <class T>
using Held = std::conditional_t<std::is_same_v<T, Any>, float, T>;

// An array of a part, read and written in units of W.
template <class T>
class Memory {
 public:
  // T says the dtype already, unless it is Any.
  BATCHOPS_DEVICE Memory(const void* array, DType dtype, int32_t begin)
      : at_(static_cast<const char*>(array) + begin * bytes_of(dtype)), dtype_(dtype) {}

  // `once`: Once or nothing.
  template <int W, class... Policy>
  BATCHOPS_DEVICE Unit<Held<T>, W> load(int32_t unit, Policy... once) const {
    const uint32_t i = unit * W;
    if constexpr (std::is_same_v<T, Any>) {
      float values[W];
      with_element(dtype_, [&](auto type) {
        using E = typename decltype(type)::type;
        to_float<E, W>(load_unit<E, W>(at<E>(i), once...), values);
      });
      return load_unit<float, W>(values);
    } else {
      return load_unit<T, W>(at<T>(i), once...);
    }
  }
  // `policy`: Once or an L2Policy.
  template <int W, class Policy>
  BATCHOPS_DEVICE void store(int32_t unit, const float (&values)[W], Policy policy) const {
    const uint32_t i = unit * W;
    if constexpr (std::is_same_v<T, Any>) {
      with_element(dtype_, [&](auto type) {
        using E = typename decltype(type)::type;
        store_unit<E, W>(const_cast<E*>(at<E>(i)), values, policy);
      });
    } else {
      store_unit<T, W>(const_cast<T*>(at<T>(i)), values, policy);
    }
  }

 private:
  // The compiler does not know that pointers out of a table lead to global memory.
  template <class E>
  BATCHOPS_DEVICE const E* at(uint32_t i) const {
    const E* element = reinterpret_cast<const E*>(at_) + i;
#ifndef BATCHOPS_CUDA_EMULATOR
    __builtin_assume(__isGlobal(element));
#endif
    return element;
  }

  const char* at_;
  DType dtype_;
};

// Units of a part, and this thread's among them: `thread`, `thread + threads`, …
struct Units {
  int32_t begin;  // the first one's element
  int32_t count;
  int32_t thread, threads;
  int32_t kept;  // elements of the part that are this thread's before these

  // kWidth elements each. Constants for `threads` save instructions.
  BATCHOPS_DEVICE static Units wide(const Part& part, int32_t threads) {
    return {0, part.units, thread_of(threads), threads, 0};
  }
  // The rest, one by one: all of the part or, by the thread whose next unit that would be, less
  // than a unit.
  BATCHOPS_DEVICE static Units narrow(const Part& part, int32_t threads) {
    if (part.units == 0) return {0, part.rest, thread_of(threads), threads, 0};
    const auto units = static_cast<unsigned>(part.units);
    const auto by = static_cast<unsigned>(threads);
    const bool own = static_cast<unsigned>(thread_of(threads)) == units % by;
    return {part.units * kWidth, own ? part.rest : 0, 0, 1,
            static_cast<int32_t>(units / by) * kWidth};
  }

 private:
  // Those of a block, or else of a warp.
  BATCHOPS_DEVICE static int32_t thread_of(int32_t threads) {
    return static_cast<int32_t>(threads == kThreads ? threadIdx.x : threadIdx.x % kWarp);
  }
};

// Calls sweep(TypeIs<P>, TypeIs<G>, integral_constant W, units) with the types of p and g or, not
// `typed` or one by one, Any. Without kGrad G is Any in any case.
template <int kBy, bool kGrad, class Sweep>
BATCHOPS_DEVICE void with_units(const Part& part, bool typed, Sweep&& sweep) {
  constexpr std::integral_constant<int, kWidth> width;
  if (part.units > 0) {
    const Units wide = Units::wide(part, kBy);
    if (!typed) {
      sweep(TypeIs<Any>{}, TypeIs<Any>{}, width, wide);
    } else {
      with_element(part.p_dtype(), [&](auto p) {
        if constexpr (kGrad) {
          with_element(part.g_dtype(), [&](auto g) { sweep(p, g, width, wide); });
        } else {
          sweep(p, TypeIs<Any>{}, width, wide);
        }
      });
    }
  }
  if (part.rest > 0) {
    sweep(TypeIs<Any>{}, TypeIs<Any>{}, std::integral_constant<int, 1>{}, Units::narrow(part, kBy));
  }
}

// Calls use(load(i), i, n) for each unit i of this thread, its n-th, kAhead loads ahead of the
// first use. The same units are the same thread's in every sweep.
template <int kAhead = kInFlight, class Load, class Use>
BATCHOPS_DEVICE void for_each_unit(const Units& units, Load&& load, Use&& use) {
  int32_t n = 0;
#pragma unroll 1
  for (int32_t first = units.thread; first < units.count; first += kAhead * units.threads) {
    // Zeros, or the compiler would carry what is not loaded from turn to turn, in registers.
    decltype(load(0)) loaded[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * units.threads < units.count) loaded[u] = load(first + u * units.threads);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * units.threads < units.count) {
        use(loaded[u], first + u * units.threads, n + u);
      }
    }
    n += kAhead;
  }
}

}  // namespace batchops::cuda::optimizer
