// LAMB over any number of tensors in four or five launches, whatever their number:
//
//   lamb_grad_squares   Σ g² of each chunk            (with a clip; back to front, so that the
//   lamb_grad_total     their sum                      gradients the next launch begins with are
//                                                      the last ones read)
//   lamb_moments        m, v; Σ p² and Σ u² of each chunk
//   lamb_ratios         r of each tensor
//   lamb_update         p; back to front again
//
// A block takes one chunk of one tensor and finds it in the table. Sums go to slots indexed by
// chunk and are added in chunk order: the same bits on every run.
#include <algorithm>
#include <cstring>

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/lamb_factors.h"

namespace batchops::cuda {
namespace {

constexpr const char* kOp = "lamb";
constexpr int kThreads = 256;
constexpr int64_t kChunk = 16 * 1024;
// Units of kWidth elements a thread loads before it uses the first.
constexpr int kInFlight = 2;
constexpr int kWidth = 4;
// Distinct (group, step) pairs a launch takes as arguments, of which there are 4 KB.
constexpr int kMaxSets = 32;

struct Entry {
  void* p;
  const void* g;
  float* m;
  float* v;
  float* master;  // or null
  int64_t numel;
  int64_t first_chunk;
  int32_t set;
  int16_t p_dtype, g_dtype;  // DType
  int32_t wide;              // all of them aligned to kWidth elements
  int32_t padding = 0;

  // What the formulas take for p.
  BATCHOPS_DEVICE void* exact() const { return master == nullptr ? p : master; }
  BATCHOPS_DEVICE DType exact_dtype() const {
    return master == nullptr ? static_cast<DType>(p_dtype) : DType::f32;
  }
};
static_assert(sizeof(Entry) == 72);

int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

int64_t chunk_count(const LambArgs& args) {
  int64_t count = 0;
  for (int64_t i = 0; i < args.tensor_count; ++i) count += chunk_count(args.tensors[i].numel);
  return count;
}

constexpr int kSums = 5;  // of LambNorms

// Where the parts of the table and the workspace lie.
struct Places {
  const Entry* entries;
  const int32_t* tensor_of;  // [chunks]
  int64_t chunks;
  double* grad_sum_sq;
  double* grad_squares;    // [chunks]
  LambNorms* norms;        // [chunks]
  LambStepFactors* steps;  // [tensors]

  Places(const LambArgs& args, const void* table, void* workspace)
      : entries(static_cast<const Entry*>(table)),
        tensor_of(reinterpret_cast<const int32_t*>(entries + args.tensor_count)),
        chunks(chunk_count(args)),
        grad_sum_sq(static_cast<double*>(workspace)),
        grad_squares(grad_sum_sq + 2),
        norms(reinterpret_cast<LambNorms*>(grad_squares + chunks + chunks % 2)),
        steps(reinterpret_cast<LambStepFactors*>(norms + chunks)) {}
};

struct StepArguments {
  Places places;
  const double* grad_sum_sq;  // null: no clip
  double max_grad_norm, clip_eps, grad_scale;
  TensorStats* stats;  // or null
  int32_t first_set, set_count;
  LambSet sets[kMaxSets];

  BATCHOPS_DEVICE bool holds(int32_t set) const {
    return set >= first_set && set < first_set + set_count;
  }
  BATCHOPS_DEVICE double divisor() const {
    return grad_sum_sq == nullptr ? grad_scale
                                  : grad_divisor(*grad_sum_sq, max_grad_norm, clip_eps, grad_scale);
  }
  BATCHOPS_DEVICE LambFactors factors(int32_t set) const {
    return LambFactors(sets[set - first_set], divisor());
  }
};

// One float whose operations round once each, so that nothing is contracted.
struct F {
  float v;

  F() = default;
  BATCHOPS_DEVICE explicit F(float value) : v(value) {}
  BATCHOPS_DEVICE friend F operator+(F a, F b) { return F(__fadd_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a, F b) { return F(__fsub_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator*(F a, F b) { return F(__fmul_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator/(F a, F b) { return F(__fdiv_rn(a.v, b.v)); }
  BATCHOPS_DEVICE friend F operator-(F a) { return F(-a.v); }
};
BATCHOPS_DEVICE F fused(F a, F b, F c) { return F(__fmaf_rn(a.v, b.v, c.v)); }
BATCHOPS_DEVICE F sqrt(F a) { return F(__fsqrt_rn(a.v)); }
BATCHOPS_DEVICE F max(F a, F b) { return a.v < b.v ? b : a; }
BATCHOPS_DEVICE F min(F a, F b) { return b.v < a.v ? b : a; }

BATCHOPS_DEVICE F select_le(F a, F b, F yes, F no) { return a.v <= b.v ? yes : no; }

#define BATCHOPS_OPTIMIZER_INLINE BATCHOPS_DEVICE
#include "kernels/compensated.inl"
#include "kernels/lamb_math.inl"
#undef BATCHOPS_OPTIMIZER_INLINE

// The chunk of this block.
struct Chunk {
  const Entry& x;
  int64_t begin;
  int32_t count;

  BATCHOPS_DEVICE Chunk(const Places& places, int64_t chunk)
      : x(places.entries[places.tensor_of[chunk]]), begin((chunk - x.first_chunk) * kChunk) {
    const int64_t left = x.numel - begin;
    count = static_cast<int32_t>(left < kChunk ? left : kChunk);
  }
};

// Calls f(TypeIs<P>{}) for the dtype; the whole block takes the same branch.
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

// Calls sweep(TypeIs of W, first, units): kWidth elements at a time where the memory allows it, and
// what is left one by one.
template <int W>
struct Width {
  static constexpr int value = W;
};
template <class Sweep>
BATCHOPS_DEVICE void in_units(const Chunk& chunk, Sweep&& sweep) {
  const int32_t units = chunk.x.wide ? chunk.count / kWidth : 0;
  if (units > 0) sweep(Width<kWidth>{}, 0, units);
  const int32_t done = units * kWidth;
  if (done < chunk.count) sweep(Width<1>{}, done, chunk.count - done);
}

// Calls load(u, i) for the next kInFlight units of this thread, then use(u, i) for each; i counts
// units.
template <class Load, class Use>
BATCHOPS_DEVICE void for_each_unit(int32_t units, Load&& load, Use&& use) {
  for (int32_t first = static_cast<int32_t>(threadIdx.x); first < units;
       first += kInFlight * kThreads) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * kThreads < units) load(u, first + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * kThreads < units) use(u, first + u * kThreads);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    lamb_grad_squares(const __grid_constant__ Places places) {
  const int64_t index = places.chunks - 1 - blockIdx.x;
  const Chunk chunk(places, index);
  double total[1] = {0};
  with_element(static_cast<DType>(chunk.x.g_dtype), [&](auto type) {
    using G = typename decltype(type)::type;
    in_units(chunk, [&](auto width, int32_t done, int32_t units) {
      constexpr int W = decltype(width)::value;
      const G* g = static_cast<const G*>(chunk.x.g) + chunk.begin + done;
      Unit<G, W> raw[kInFlight];
      for_each_unit(
          units, [&](int u, int32_t i) { raw[u] = load_unit<G, W>(g + i * W); },
          [&](int u, int32_t) {
            float value[W];
            to_float<G, W>(raw[u], value);
#pragma unroll
            for (int j = 0; j < W; ++j) {
              total[0] =
                  fma(static_cast<double>(value[j]), static_cast<double>(value[j]), total[0]);
            }
          });
    });
  });
  block_sum<kThreads>(total);
  if (threadIdx.x == 0) places.grad_squares[index] = total[0];
}

__global__ void __launch_bounds__(kThreads)
    lamb_grad_total(const __grid_constant__ Places places, double* sum_sq) {
  double total[1] = {0};
  for (int64_t i = threadIdx.x; i < places.chunks; i += kThreads) {
    total[0] += places.grad_squares[i];
  }
  block_sum<kThreads>(total);
  if (threadIdx.x == 0) *sum_sq = total[0];
}

__global__ void __launch_bounds__(kThreads)
    lamb_moments(const __grid_constant__ StepArguments args) {
  const Chunk chunk(args.places, blockIdx.x);
  const Entry& x = chunk.x;
  if (!args.holds(x.set)) return;
  BATCHOPS_SHARED(factors, LambFactors);
  if (threadIdx.x == 0) factors = args.factors(x.set);
  __syncthreads();
  const Constants c(factors);
  const bool caution = args.sets[x.set - args.first_set].caution != 0;
  double norms[kSums] = {};  // in the order of LambNorms

  with_element(x.exact_dtype(), [&](auto p_type) {
    with_element(static_cast<DType>(x.g_dtype), [&](auto g_type) {
      using P = typename decltype(p_type)::type;
      using G = typename decltype(g_type)::type;
      in_units(chunk, [&](auto width, int32_t done, int32_t units) {
        constexpr int W = decltype(width)::value;
        const int64_t begin = chunk.begin + done;
        const P* p = static_cast<const P*>(x.exact()) + begin;
        const G* g = static_cast<const G*>(x.g) + begin;
        float* m = x.m + begin;
        float* v = x.v + begin;
        Unit<P, W> p_raw[kInFlight];
        Unit<G, W> g_raw[kInFlight];
        Unit<float, W> m_raw[kInFlight], v_raw[kInFlight];
        for_each_unit(
            units,
            [&](int u, int32_t i) {
              p_raw[u] = load_unit<P, W>(p + i * W);
              g_raw[u] = load_unit<G, W>(g + i * W);
              m_raw[u] = load_unit<float, W>(m + i * W);
              v_raw[u] = load_unit<float, W>(v + i * W);
            },
            [&](int u, int32_t i) {
              float p_i[W], g_i[W], m_i[W], v_i[W];
              to_float<P, W>(p_raw[u], p_i);
              to_float<G, W>(g_raw[u], g_i);
              to_float<float, W>(m_raw[u], m_i);
              to_float<float, W>(v_raw[u], v_i);
#pragma unroll
              for (int j = 0; j < W; ++j) {
                const F g_j = F(g_i[j]) * c.g_scale;
                const F m_j = first_moment(F(m_i[j]), g_j, c);
                const F v_j = second_moment(F(v_i[j]), g_j, c);
                m_i[j] = m_j.v;
                v_i[j] = v_j.v;
                // Rounding errors of single elements average out in the norm.
                const F q_j = rough_quotient(m_j, v_j, c);
                const double p_wide = p_i[j], g_wide = g_j.v;
                norms[0] = fma(p_wide, p_wide, norms[0]);
                norms[1] = fma(g_wide, g_wide, norms[1]);
                double u_wide;
                if (caution) {
                  const F agree = agreement(m_j, g_j);
                  u_wide = where_positive(agree, q_j).v;
                  norms[3] = fma(u_wide, p_wide, norms[3]);
                  norms[4] += where_positive(agree, F(1.0f)).v;
                } else {
                  u_wide = fused(c.weight_decay, F(p_i[j]), q_j).v;
                }
                norms[2] = fma(u_wide, u_wide, norms[2]);
              }
              store_unit<float, W>(m + i * W, m_i);
              store_unit<float, W>(v + i * W, v_i);
            });
      });
    });
  });
  block_sum<kThreads>(norms);
  if (threadIdx.x == 0)
    args.places.norms[blockIdx.x] = {norms[0], norms[1], norms[2], norms[3], norms[4]};
}

// A block a tensor.
__global__ void __launch_bounds__(kThreads)
    lamb_ratios(const __grid_constant__ StepArguments args) {
  const Entry& x = args.places.entries[blockIdx.x];
  if (!args.holds(x.set)) return;
  const LambSet& set = args.sets[x.set - args.first_set];
  double norms[kSums] = {};
  const int64_t chunks = (x.numel + kChunk - 1) / kChunk;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    const LambNorms& chunk = args.places.norms[x.first_chunk + i];
    const double values[kSums] = {chunk.p_sq, chunk.g_sq, chunk.u_sq, chunk.cross, chunk.kept};
#pragma unroll
    for (int k = 0; k < kSums; ++k) norms[k] += values[k];
  }
  block_sum<kThreads>(norms);
  if (threadIdx.x == 0) {
    const LambOutcome outcome(set, {norms[0], norms[1], norms[2], norms[3], norms[4]}, x.numel,
                              args.divisor(), args.grad_scale);
    args.places.steps[blockIdx.x] = outcome.step;
    if (args.stats != nullptr) args.stats[blockIdx.x] = outcome.stats;
  }
}

// The low-precision copies of masters that have changed.
template <int W>
BATCHOPS_DEVICE void publish(const Entry& x, int64_t at, const float (&p)[W]) {
  with_element(static_cast<DType>(x.p_dtype), [&](auto type) {
    using P = typename decltype(type)::type;
    store_unit<P, W>(static_cast<P*>(x.p) + at, p);
  });
}

__global__ void __launch_bounds__(kThreads, 4)
    lamb_update(const __grid_constant__ StepArguments args) {
  const int64_t index = args.places.chunks - 1 - blockIdx.x;
  const Chunk chunk(args.places, index);
  const Entry& x = chunk.x;
  if (!args.holds(x.set)) return;
  BATCHOPS_SHARED(factors, LambFactors);
  if (threadIdx.x == 0) factors = args.factors(x.set);
  __syncthreads();
  const Constants c(factors);
  const StepConstants step(args.places.steps[args.places.tensor_of[index]]);

  const bool caution = args.sets[x.set - args.first_set].caution != 0;

  with_element(x.exact_dtype(), [&](auto type) {
    using P = typename decltype(type)::type;
    in_units(chunk, [&](auto width, int32_t done, int32_t units) {
      constexpr int W = decltype(width)::value;
      const int64_t begin = chunk.begin + done;
      P* p = static_cast<P*>(x.exact()) + begin;
      const float* m = x.m + begin;
      const float* v = x.v + begin;
      Unit<P, W> p_raw[kInFlight];
      Unit<float, W> m_raw[kInFlight], v_raw[kInFlight];
      for_each_unit(
          units,
          [&](int u, int32_t i) {
            p_raw[u] = load_unit<P, W>(p + i * W);
            m_raw[u] = load_unit<float, W>(m + i * W);
            v_raw[u] = load_unit<float, W>(v + i * W);
          },
          [&](int u, int32_t i) {
            float p_i[W], m_i[W], v_i[W];
            to_float<P, W>(p_raw[u], p_i);
            to_float<float, W>(m_raw[u], m_i);
            to_float<float, W>(v_raw[u], v_i);
#pragma unroll
            for (int j = 0; j < W; ++j) {
              Quotient q = quotient(F(m_i[j]), F(v_i[j]), c);
              if (caution) {
                // Rare enough for loads of single elements.
                const float g_j =
                    load_as_float(x.g, static_cast<DType>(x.g_dtype), begin + int64_t{i} * W + j);
                const F agree = agreement(F(m_i[j]), F(g_j) * c.g_scale);
                q = {where_positive(agree, q.high), where_positive(agree, q.low)};
              }
              p_i[j] = updated(F(p_i[j]), q, step).v;
            }
            store_unit<P, W>(p + i * W, p_i);
            if (x.master != nullptr) publish<W>(x, begin + int64_t{i} * W, p_i);
          });
    });
  });
}

const char* sum_squares(const Places& places, double* sum_sq, void* stream) {
  if (places.chunks > 0) {
    const char* error =
        launch("lamb_grad_squares", lamb_grad_squares, places.chunks, kThreads, 0, stream, places);
    if (error != nullptr) return error;
  }
  return launch("lamb_grad_total", lamb_grad_total, 1, kThreads, 0, stream, places, sum_sq);
}

}  // namespace
}  // namespace batchops::cuda

namespace batchops {

size_t lamb_table_bytes_cuda(const LambArgs& args) {
  return args.tensor_count * sizeof(cuda::Entry) + cuda::chunk_count(args) * sizeof(int32_t);
}

void lamb_write_table_cuda(const LambArgs& args, void* table) {
  std::vector<LambSet> sets;
  const std::vector<int32_t> set_of = lamb_sets(args, sets);
  auto* bytes = static_cast<unsigned char*>(table);
  unsigned char* tensor_of = bytes + args.tensor_count * sizeof(cuda::Entry);
  int64_t chunk = 0;
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    const OptimizerTensor& x = args.tensors[i];
    const bool wide = cuda::is_aligned(x.p, cuda::kWidth * static_cast<int>(size_of(x.p_dtype))) &&
                      cuda::is_aligned(x.g, cuda::kWidth * static_cast<int>(size_of(x.g_dtype))) &&
                      cuda::is_aligned(x.m, 16) && cuda::is_aligned(x.v, 16) &&
                      cuda::is_aligned(x.master, 16);
    const cuda::Entry entry{x.p,
                            x.g,
                            x.m,
                            x.v,
                            x.master,
                            x.numel,
                            chunk,
                            set_of[i],
                            static_cast<int16_t>(x.p_dtype),
                            static_cast<int16_t>(x.g_dtype),
                            wide};
    std::memcpy(bytes + i * sizeof entry, &entry, sizeof entry);
    const auto tensor = static_cast<int32_t>(i);
    for (int64_t k = cuda::chunk_count(x.numel); k > 0; --k, ++chunk) {
      std::memcpy(tensor_of + chunk * sizeof tensor, &tensor, sizeof tensor);
    }
  }
}

size_t lamb_workspace_bytes_cuda(const LambArgs& args) {
  const int64_t chunks = cuda::chunk_count(args);
  return (2 + chunks + chunks % 2) * sizeof(double) + chunks * sizeof(LambNorms) +
         args.tensor_count * sizeof(LambStepFactors);
}

const char* lamb_grad_sum_sq_cuda(const LambArgs& args, const void* table, void* workspace,
                                  double* sum_sq, int device, void* stream) {
  if (const char* error = cuda::set_device(cuda::kOp, device)) return error;
  return cuda::sum_squares(cuda::Places(args, table, workspace), sum_sq, stream);
}

const char* lamb_step_cuda(const LambArgs& args, const void* table, void* workspace,
                           const double* grad_sum_sq, TensorStats* stats, int device,
                           void* stream) {
  if (const char* error = cuda::set_device(cuda::kOp, device)) return error;
  std::vector<LambSet> sets;
  lamb_sets(args, sets);
  cuda::StepArguments step{cuda::Places(args, table, workspace),
                           nullptr,
                           args.max_grad_norm,
                           args.clip_eps,
                           args.grad_scale,
                           stats};
  const int64_t chunks = step.places.chunks;
  if (chunks == 0) return nullptr;
  if (args.max_grad_norm > 0) {
    if (grad_sum_sq == nullptr) {
      if (const char* error = cuda::sum_squares(step.places, step.places.grad_sum_sq, stream)) {
        return error;
      }
      grad_sum_sq = step.places.grad_sum_sq;
    }
    step.grad_sum_sq = grad_sum_sq;
  }
  // Mostly once: parameters of a group rarely differ in their step counts.
  const auto set_count = static_cast<int32_t>(sets.size());
  for (int32_t first = 0; first < set_count; first += cuda::kMaxSets) {
    step.first_set = first;
    step.set_count = std::min(cuda::kMaxSets, set_count - first);
    std::copy_n(sets.begin() + first, step.set_count, step.sets);
    const char* error =
        cuda::launch("lamb_moments", cuda::lamb_moments, chunks, cuda::kThreads, 0, stream, step);
    if (error == nullptr) {
      error = cuda::launch("lamb_ratios", cuda::lamb_ratios, args.tensor_count, cuda::kThreads, 0,
                           stream, step);
    }
    if (error == nullptr) {
      error =
          cuda::launch("lamb_update", cuda::lamb_update, chunks, cuda::kThreads, 0, stream, step);
    }
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace batchops
