// Group norm forward: statistics of each group, then y = activation((x - mean) · rstd · weight +
// bias + residual). Reads x once and writes y once where groups fit a block or a cluster; beyond,
// reads x twice (+ 1 read of the residual, + the mask). Where the statistics are known: once.
#include "kernels/cuda/group_norm_launch.cuh"
#include "kernels/cuda/group_norm_walks.cuh"

namespace batchops::cuda {
inline namespace group_norm_forward_cu {

using namespace group;  // NOLINT: all of this file is its

struct ForwardArguments {
  Cut cut;
  SharedPlan shared;
  const void* x;
  const void* residual;
  void* y;
  uint8_t* mask;
  float* stats;      // [3, groups]
  Moments* moments;  // [pieces, local_groups], where streamed
  Affines affines;
  double eps;
};

// The elementwise half. x comes from shared memory (kResident) or from the tensor.
template <class T, class Act, bool kResident, bool kMayAdd = true>
struct ForwardJob {
  static constexpr bool kLone = kResident && !Act::kMaskable;
  static constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;
  static constexpr bool kSplits = kResident && sizeof(T) == 2 && kMayAdd && !kAnyActivation<Act>;

  struct alignas(16) Coefficients : AffineOf<T> {};
  static constexpr int kAhead = kResident || kAnyActivation<Act> ? 1 : 2;
  // Elements of a unit whose coefficients are in registers at once.
  template <int W>
  static constexpr int kPiece = W;
  template <int W>
  static constexpr int kOddPiece = W;
  template <int W>
  struct Held {
    Unit<T, W> x, residual;
  };

  const ForwardArguments& args;
  const Act& act;
  const Arena& arena;
  const T* kept;
  const Terms* terms;  // of the part's groups
  uint8_t* mask_to;
  const uint8_t* mask;  // not read

  BATCHOPS_DEVICE ForwardJob(const ForwardArguments& a, const Act& f, const Arena& s)
      : args(a),
        act(f),
        arena(s),
        kept(arena.tensor<T>(0)),
        terms(arena.terms()),
        mask_to(a.mask),
        mask(nullptr) {}

  template <int kPart, int W>
  BATCHOPS_DEVICE static Held<kPart> piece(const Held<W>& held, int i) {
    return {part_of<kPart>(held.x, i), part_of<kPart>(held.residual, i)};
  }
  BATCHOPS_DEVICE static constexpr bool masked() { return false; }
  BATCHOPS_DEVICE bool adds_residual() const {
    if constexpr (!kMayAdd) return false;
    return args.residual != nullptr;
  }
  BATCHOPS_DEVICE bool is_plain() const { return !adds_residual(); }
  BATCHOPS_DEVICE auto plain() const {
    return ForwardJob<T, Act, kResident, false>(args, act, arena);
  }
  BATCHOPS_DEVICE bool writes_mask() const { return Act::kMaskable && mask_to != nullptr; }

  BATCHOPS_DEVICE Coefficients make_with(const Terms& t, float weight, float bias) const {
    return {make_affine_of<T>(t, weight, bias)};
  }
  BATCHOPS_DEVICE Coefficients make(int64_t c, int r) const {
    return make_with(terms[r], args.affines.weight_of(c), args.affines.bias_of(c));
  }
  template <int W>
  BATCHOPS_DEVICE void make_row(int64_t c, int r, Coefficients (&k)[W]) const {
    const Terms& t = terms[r];
    float w[W], b[W];
    args.affines.load<W>(c, w, b);
#pragma unroll
    for (int j = 0; j < W; ++j) k[j] = {make_affine_of<T>(t, w[j], b[j])};
  }

  template <int W, class Walk>
  BATCHOPS_DEVICE void load_outer(const Walk& walk, Held<W>& held, int64_t at, int i) const {
    const T* __restrict__ x = static_cast<const T*>(args.x);
    const T* __restrict__ residual = static_cast<const T*>(args.residual);
    if constexpr (kResident) {
      held.x = load_unit<T, W>(kept + i);
    } else {
      held.x = walk.template load_at<T, W>(x, at);
    }
    if (adds_residual()) held.residual = walk.template load_at<T, W>(residual, at);
  }

  template <int W, class CoefficientsOf>
  BATCHOPS_DEVICE unsigned run(const Held<W>& held, int64_t at, const Range& valid,
                               CoefficientsOf k, unsigned) const {
    float v[W];
    float r[W] = {};
    to_float<T, W>(held.x, v);
    const bool adds = adds_residual();
    if (adds) to_float<T, W>(held.residual, r);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float z = k(j)(v[j]);
      if (adds) z = __fadd_rn(z, r[j]);
      v[j] = z;
      if constexpr (Act::kMaskable) {
        if (!(act.mask_source(z) <= 0.0f)) bits |= 1u << j;
      }
    }
    for_each_element(act, v, r, [](auto functor, float z, float) { return functor.forward(z); });
    store_range<T, W>(static_cast<T*>(args.y) + at, v, valid);
    return bits;
  }
};

// Blocks on a multiprocessor at the least. What ptxas makes of eight columns needs more than the 80
// registers of two, on sm_90 only where the activation is known at run time.
template <Layout kLayout, int W>
constexpr bool kEightColumns = kLayout == Layout::channels_last && W == 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <Layout kLayout, int W, class Act>
constexpr int kLeastBlocks = kEightColumns<kLayout, W> ? 1 : kLeastResident;
#else
template <Layout kLayout, int W, class Act>
constexpr int kLeastBlocks = kEightColumns<kLayout, W> && kAnyActivation<Act> ? 1 : kLeastResident;
#endif

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<kLayout, W, Act>)
    group_norm_forward(const __grid_constant__ ForwardArguments args,
                       const __grid_constant__ Act act) {
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  const Arena arena{bytes, args.shared};
  for (int64_t piece = blockIdx.x; piece < args.cut.pieces; piece += gridDim.x) {
    using Walk = WalkOf<kLayout>;
    using Place = typename Walk::Place;
    T* kept = arena.tensor<T>(0);
    Walk(args.cut, piece).template keep<T, W>(kept, static_cast<const T*>(args.x));
    arena.leave_place<Place>(args.cut, forgotten(piece));
    wait_for_copies();
    __syncthreads();
    const Walk part(args.cut, arena.place<Place>());
    part.template moments<T, W>(kept, arena);
    Moments* moments = arena.moments();
    if (!args.cut.resident) {
      for (int r = threadIdx.x; r < part.groups; r += kBlock) {
        args.moments[piece * args.cut.local_groups + r] = moments[r];
      }
      __syncthreads();
      continue;
    }
    if (args.cut.cluster()) cluster_sync();
    const int64_t slot = piece - args.cut.by_parts.quotient(piece) * args.cut.parts;
    merge_groups(
        part.groups, args.cut.part_lanes, [&](int) { return args.cut.parts; },
        [&](int) { return args.cut.M; },
        [&](int r, int k) { return args.cut.cluster() ? *of_rank(moments + r, k) : moments[r]; },
        [&](int r, const MeanAndVariance& found) {
          const Terms terms = forward_terms(found, args.cut.M, args.eps);
          arena.terms()[r] = terms;
          if (slot != 0) return;
          const int64_t group = part.first_group + r;
          args.stats[group] = terms.mean;
          args.stats[args.cut.groups + group] = terms.low;
          args.stats[2 * args.cut.groups + group] = terms.rstd;
        });
    __syncthreads();
    if (args.cut.cluster()) cluster_arrive();
    part.template apply<T, W>(ForwardJob<T, Act, true>(args, act, arena));
    __syncthreads();
    if (args.cut.cluster()) cluster_wait();
  }
}

// A block a group.
__global__ void __launch_bounds__(kFinishBlock)
    group_norm_forward_finish(const __grid_constant__ ForwardArguments args) {
  const Cut& cut = args.cut;
  for (int64_t group = blockIdx.x; group < cut.groups; group += gridDim.x) {
    // Groups so large that they are streamed, and their parts, are few.
    const auto n = static_cast<unsigned>(group) / static_cast<unsigned>(cut.G);
    const auto g = static_cast<unsigned>(group) - n * static_cast<unsigned>(cut.G);
    const auto D = static_cast<unsigned>(cut.D);
    const auto width = static_cast<unsigned>(cut.width);
    const auto parts = static_cast<unsigned>(cut.parts);
    const unsigned first = cut.pixels ? g * D / width : 0;
    const unsigned last = cut.pixels ? ((g + 1) * D - 1) / width : 0;
    const auto get = [&](int64_t k) {
      if (!cut.pixels) return args.moments[group * cut.parts + k];
      const unsigned tile = static_cast<unsigned>(k) / parts;
      const int64_t piece = (n * cut.tiles + first + tile) * parts + (k - int64_t{tile} * parts);
      const unsigned local = g - (first + tile) * width / D;
      return args.moments[piece * cut.local_groups + local];
    };
    const auto found = merge(cut.M, int64_t{last - first + 1} * parts,
                             static_cast<int>(threadIdx.x), kFinishBlock, get, [](double value) {
                               double values[1] = {value};
                               block_sum<kFinishBlock>(values);
                               return values[0];
                             });
    if (threadIdx.x != 0) continue;
    const Terms terms = forward_terms(found, cut.M, args.eps);
    args.stats[group] = terms.mean;
    args.stats[cut.groups + group] = terms.low;
    args.stats[2 * cut.groups + group] = terms.rstd;
  }
}

// Back to front: what was read last is still in the cache.
template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<kLayout, W, Act>)
    group_norm_forward_apply(const __grid_constant__ ForwardArguments args,
                             const __grid_constant__ Act act) {
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  const Arena arena{bytes, args.shared};
  for (int64_t i = blockIdx.x; i < args.cut.pieces; i += gridDim.x) {
    const WalkOf<kLayout> part(args.cut, args.cut.pieces - 1 - i);
    for (int r = threadIdx.x; r < part.groups; r += kBlock) {
      arena.terms()[r] = load_terms(args.stats, args.cut.groups, part.first_group + r);
    }
    __syncthreads();
    part.template apply<T, W>(ForwardJob<T, Act, false>(args, act, arena));
    __syncthreads();
  }
}

constexpr const char* kOperation = "group_norm_forward_cuda";

Purpose purpose_of(const GroupNormShape& shape, bool mask) {
  return {1, static_cast<int>(size_of(shape.dtype)), false, mask};
}

// On what `found` has.
const char* forward(const GroupNormForward& args, void* workspace, const Device& found, int device,
                    void* stream, bool& refused) {
  const GroupNormShape& shape = args.shape;
  const auto run = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    constexpr Layout kLayout = decltype(layout)::value;
    using Act = decltype(act);
    const Purpose purpose = purpose_of(shape, args.mask != nullptr);
    ForwardArguments to{};
    to.cut = make_cut(shape, purpose, W, found);
    to.shared = plan_shared(to.cut, purpose, W);
    to.x = args.x;
    to.residual = args.residual;
    to.y = args.y;
    to.mask = args.mask;
    to.stats = static_cast<float*>(args.stats);
    to.moments = static_cast<Moments*>(workspace);
    to.affines = affines_of(args.weight, args.bias, shape.param_dtype);
    to.eps = args.eps;
    if (!args.have_stats) {
      if (const char* error =
              launch_parts(kOperation, "group_norm_forward", group_norm_forward<T, kLayout, W, Act>,
                           to, act, device, stream, refused)) {
        return error;
      }
      if (refused || to.cut.resident) return nullptr;
      int64_t blocks = 0;
      if (const char* error = grid_size(kOperation, device, to.cut.groups, blocks)) return error;
      if (const char* error = launch("group_norm_forward_finish", group_norm_forward_finish, blocks,
                                     kFinishBlock, 0, stream, to)) {
        return error;
      }
    }
    to.shared = plan_apply(to.cut, false);
    LaunchShape grid;
    if (const char* error = apply_shape(kOperation, to, device, grid)) return error;
    return launch("group_norm_forward_apply", group_norm_forward_apply<T, kLayout, W, Act>, grid,
                  stream, to, act);
  };
  return dispatch(kOperation, shape, args.mask != nullptr, {args.x, args.residual, args.y}, run);
}

}  // namespace group_norm_forward_cu
}  // namespace batchops::cuda

namespace batchops {

size_t group_norm_forward_workspace_cuda(const GroupNormForward& args, int device) {
  const GroupNormShape& shape = args.shape;
  if (shape.numel() == 0 || shape.dtype == DType::f64) return 0;
  cuda::Device found;
  if (cuda::query(cuda::kOperation, device, found) != nullptr) return 0;
  const cuda::group::Purpose purpose = cuda::purpose_of(shape, args.mask != nullptr);
  int64_t moments = 1;  // never null
  cuda::group::for_each_cut(shape, purpose, found, [&](const cuda::group::Cut& cut) {
    moments = std::max(moments, cut.moments());
  });
  return static_cast<size_t>(moments) * sizeof(cuda::Moments);
}

const char* group_norm_forward_cuda(const GroupNormForward& args, void* workspace, int device,
                                    void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  cuda::Device found;
  if (const char* error = cuda::query(cuda::kOperation, device, found)) return error;
  if (const char* error = cuda::group::validate(cuda::kOperation, args.shape, args.mask)) {
    return error;
  }
  if (args.x == nullptr || args.y == nullptr || args.stats == nullptr || workspace == nullptr) {
    return cuda::message("%s: x, y, stats and workspace must not be null", cuda::kOperation);
  }
  return cuda::group::with_fallback(found, [&](const cuda::Device& on, bool& refused) {
    return cuda::forward(args, workspace, on, device, stream, refused);
  });
}

}  // namespace batchops
