// Group norm backward. With dz = dy · activation'(z), t_c = Σ dz · x̂ over a channel's part of a
// sample, and A = Σ weight · Σ dz, B = Σ weight · t over the channels of a group:
//
//   dbias = Σ_n Σ dz,   dweight = Σ_n t
//   dx = rstd · weight · dz + along · (x - mean) + constant
//        along = -rstd² · B / M,   constant = -rstd · A / M - along · mean_low
//
// Reads dy and x once and writes dx once where groups fit a block or a cluster; beyond, reads both
// twice (+ 1 or 2 reads of the residual where z needs it, + the mask, + 1 write of dresidual).
// z is recomputed from x unless there is a mask.
#include "kernels/cuda/group_norm_launch.cuh"
#include "kernels/cuda/group_norm_walks.cuh"

namespace batchops::cuda {
inline namespace group_norm_backward_cu {

using namespace group;  // NOLINT: all of this file is its

struct BackwardArguments {
  Cut cut;
  SharedPlan shared;
  const void* dy;
  const void* x;
  const void* residual;  // null where z does not need it
  const uint8_t* mask;
  void* dx;
  void* dresidual;
  const float* stats;  // [3, groups]
  float2* by_channel;  // [sum_rows, C]: Σ dz and t; may be null where not streamed
  float2* directions;  // [groups]: along, constant; where streamed
  Affines affines;
  bool recomputes;  // z
  bool folded;      // kFolded<T>
};

// Bytes of two words: that of the result's byte i is the selector's digit i.
BATCHOPS_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef BATCHOPS_CUDA_EMULATOR
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  }
  return result;
#else
  return __byte_perm(a, b, selector);
#endif
}

// Floats cut in two, to be kept where elements have 16 bits: a head of the upper 16 bits, and a
// tail of the next eight. What is lost then is less than 2^-16 of each, an element's rounding
// costs at least 2^-12.
template <int W>
struct Tails {
  // `heads` has room for W elements of 16 bits.
  BATCHOPS_DEVICE static void keep(const float (&from)[W], void* heads, uint8_t* tails) {
    uint32_t bits[W];
    memcpy(bits, from, sizeof bits);
    if constexpr (W == 1) {
      *static_cast<uint16_t*>(heads) = static_cast<uint16_t>(bits[0] >> 16);
      *tails = static_cast<uint8_t>(bits[0] >> 8);
    } else {
      uint32_t of_heads[W / 2], of_tails[W / 2];
#pragma unroll
      for (int j = 0; j < W / 2; ++j) {
        of_heads[j] = bytes_of(bits[2 * j], bits[2 * j + 1], 0x7632);
        of_tails[j] = bytes_of(bits[2 * j], bits[2 * j + 1], 0x0051);
      }
      keep_words<W * 2>(static_cast<unsigned char*>(heads), of_heads);
      if constexpr (W == 2) {
        *reinterpret_cast<uint16_t*>(tails) = static_cast<uint16_t>(of_tails[0]);
      } else {
        uint32_t packed[W / 4];
#pragma unroll
        for (int j = 0; j < W / 4; ++j) {
          packed[j] = bytes_of(of_tails[2 * j], of_tails[2 * j + 1], 0x5410);
        }
        keep_words<W>(tails, packed);
      }
    }
  }
  template <class T>
  BATCHOPS_DEVICE static void join(const Unit<T, W>& heads, const Unit<uint8_t, W>& tails,
                                   float (&to)[W]) {
    static_assert(sizeof(T) == 2);
    uint32_t bits[W];
    if constexpr (W == 1) {
      bits[0] = uint32_t{heads.bits} << 16 | uint32_t{tails.bits} << 8;
    } else {
      uint32_t of_heads[W / 2], of_tails[W < 4 ? 1 : W / 4] = {};
      memcpy(of_heads, &heads.bits, sizeof of_heads);
      memcpy(of_tails, &tails.bits, W);
      // The lowest byte is the one above it once more, since there is no 0 to be had for nothing.
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const uint32_t tail = 0x0044u + 0x0011u * (j % 4), head = j % 2 == 0 ? 0x1000u : 0x3200u;
        bits[j] = bytes_of(of_heads[j / 2], of_tails[j / 4], head | tail);
      }
    }
    memcpy(to, bits, sizeof bits);
  }

 private:
  template <int kBytes, int kWords>
  BATCHOPS_DEVICE static void keep_words(unsigned char* to, const uint32_t (&words)[kWords]) {
    static_assert(kBytes == 4 * kWords);
    typename Word<kBytes>::type word;
    memcpy(&word, words, sizeof word);
    *reinterpret_cast<typename Word<kBytes>::type*>(to) = word;
  }
};

// Whether SiLU's own instance keeps dz so. Not for pixels, whose tiles would be narrower with a
// byte more an element; slices stay as they are. That instance is not for layer norm, which sums
// for its parameters over what is kept.
inline bool is_tailed(const GroupNormShape& shape, bool mask) {
  return size_of(shape.dtype) == 2 && shape.activation == Activation::silu &&
         !walks_pixels(shape, mask);
}

// One element of dz, and of dx. kResident: the tensors are in shared memory. kTails: whether the
// plan has room for tails, if it is for SiLU. kJoins: whether dy is of heads and tails.
template <class T, class Act, bool kResident, bool kTails, bool kMayAdd = true, bool kJoins = false>
struct BackwardJob {
  static constexpr bool kLone = kResident && !Act::kMaskable;
  static constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;
  static constexpr bool kSplits =
      kResident && sizeof(T) == 2 && Act::kNeedsZ && kMayAdd && !kAnyActivation<Act>;
  // Whether add() leaves dz in the place of dy.
  static constexpr bool kLeavesTails = kTails && sizeof(T) == 2 && std::is_same_v<Act, Silu>;
  static constexpr bool kLeavesDz =
      kResident && Act::kNeedsZ && (sizeof(T) == sizeof(float) || kLeavesTails);

  struct alignas(16) Coefficients {
    AffineOf<T> affine;
    float along, constant;
    float weight;
  };
  static constexpr int kAhead = kResident || kAnyActivation<Act> ? 1 : 2;
  // Elements of a unit whose coefficients are in registers at once.
  template <int W>
  static constexpr int kPiece = kFolded<T> && !Act::kNeedsZ ? W : sum_width(W);
  // … where each is looked up.
  template <int W>
  static constexpr int kOddPiece = Act::kNeedsZ && W > 2 ? 2 : sum_width(W);
  template <int W>
  struct Held {
    Unit<T, W> x, dy, residual;
    Unit<uint8_t, W> tails;
  };
  template <int kPart, int W>
  BATCHOPS_DEVICE static Held<kPart> piece(const Held<W>& held, int i) {
    Held<kPart> part;
    part.x = part_of<kPart>(held.x, i);
    part.dy = part_of<kPart>(held.dy, i);
    part.residual = part_of<kPart>(held.residual, i);
    if constexpr (kJoins) part.tails = part_of<kPart>(held.tails, i);
    return part;
  }

  const BackwardArguments& args;
  const Act& act;
  const Arena& arena;
  const uint8_t* mask;
  uint8_t* mask_to;  // not written

  BATCHOPS_DEVICE BackwardJob(const BackwardArguments& a, const Act& f, const Arena& s)
      : args(a), act(f), arena(s), mask(a.mask), mask_to(nullptr) {}

  BATCHOPS_DEVICE bool masked() const { return Act::kMaskable && mask != nullptr; }
  BATCHOPS_DEVICE static constexpr bool writes_mask() { return false; }
  BATCHOPS_DEVICE bool adds_residual() const {
    if constexpr (!kMayAdd || !Act::kNeedsZ) return false;
    return args.residual != nullptr;
  }
  BATCHOPS_DEVICE bool wants_dresidual() const { return kMayAdd && args.dresidual != nullptr; }
  // Without those the only output is dx.
  BATCHOPS_DEVICE bool wants_dx() const { return !kMayAdd || args.dx != nullptr; }
  BATCHOPS_DEVICE bool is_plain() const { return !adds_residual() && !wants_dresidual(); }
  BATCHOPS_DEVICE auto plain() const {
    return BackwardJob<T, Act, kResident, kTails, false, kJoins>(args, act, arena);
  }
  // f(job) with what is left to do once add() has been over all elements.
  template <class F>
  BATCHOPS_DEVICE void when_added(F f) const {
    if constexpr (kLeavesDz) {
      const Identity dz;
      f(BackwardJob<T, Identity, kResident, kTails, true, kLeavesTails>(args, dz, arena));
    } else {
      f(*this);
    }
  }

  BATCHOPS_DEVICE Coefficients make_with(const Terms& t, float weight, float bias) const {
    return {make_affine_of<T>(t, weight, bias), t.along, t.constant, weight};
  }
  BATCHOPS_DEVICE Coefficients make(int64_t c, int r) const {
    return make_with(arena.terms()[r], args.affines.weight_of(c),
                     Act::kNeedsZ ? args.affines.bias_of(c) : 0.0f);
  }
  template <int W>
  BATCHOPS_DEVICE void make_row(int64_t c, int r, Coefficients (&k)[W]) const {
    const Terms& t = arena.terms()[r];
    float w[W], b[W];
    args.affines.load<W>(c, w, b);
#pragma unroll
    for (int j = 0; j < W; ++j) k[j] = make_with(t, w[j], b[j]);
  }

  // From shared memory.
  template <int W>
  BATCHOPS_DEVICE void load(Held<W>& held, int i) const {
    held.x = load_unit<T, W>(arena.tensor<T>(0) + i);
    held.dy = load_unit<T, W>(arena.tensor<T>(1) + i);
    if constexpr (kJoins) held.tails = load_unit<uint8_t, W>(arena.tails() + i);
    if (adds_residual()) held.residual = load_unit<T, W>(arena.tensor<T>(2) + i);
  }
  template <int W, class Walk>
  BATCHOPS_DEVICE void load_outer(const Walk& walk, Held<W>& held, int64_t at, int i) const {
    if constexpr (kResident) {
      load<W>(held, i);
      return;
    }
    const T* __restrict__ x = static_cast<const T*>(args.x);
    const T* __restrict__ dy = static_cast<const T*>(args.dy);
    const T* __restrict__ residual = static_cast<const T*>(args.residual);
    held.x = zero_unit<T, W>();
    if (args.dx != nullptr || args.recomputes) held.x = walk.template load_at<T, W>(x, at);
    held.dy = walk.template load_at<T, W>(dy, at);
    if (adds_residual()) held.residual = walk.template load_at<T, W>(residual, at);
  }

  // What is scaled: x - mean, or x.
  template <int W, class CoefficientsOf>
  BATCHOPS_DEVICE void centre(const Held<W>& held, CoefficientsOf k, float (&centred)[W]) const {
    to_float<T, W>(held.x, centred);
#pragma unroll
    for (int j = 0; j < W; ++j) centred[j] = k(j).affine.centred(centred[j]);
  }

  // dz; z is rounded as in the forward.
  template <int W, class CoefficientsOf>
  BATCHOPS_DEVICE void differentiate(const Held<W>& held, CoefficientsOf k, unsigned bits,
                                     const float (&centred)[W], float (&dz)[W]) const {
    if constexpr (kJoins) {
      Tails<W>::join(held.dy, held.tails, dz);
    } else {
      to_float<T, W>(held.dy, dz);
    }
    if constexpr (Act::kNeedsZ) {
      if (masked()) {
        if constexpr (Act::kMaskable) {
#pragma unroll
          for (int j = 0; j < W; ++j) dz[j] = act.backward_bits(dz[j], bits >> j & 1u);
        }
        return;
      }
      float z[W] = {};
      const bool adds = adds_residual();
      if (adds) to_float<T, W>(held.residual, z);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float normalised = k(j).affine.scaled(centred[j]);
        z[j] = adds ? __fadd_rn(normalised, z[j]) : normalised;
      }
      for_each_element<1>(act, dz, z, [](auto functor, float gradient, float of) {
        if constexpr (sizeof(T) == 2) {
          return functor.backward(Coarse(gradient), Coarse(of)).v;
        } else {
          return functor.backward(gradient, of);
        }
      });
    }
  }

  // sink(j, dz, dz · what is scaled) of what lies at i in shared memory.
  template <int W, class CoefficientsOf, class Sink>
  BATCHOPS_DEVICE void add(const Held<W>& held, int i, CoefficientsOf k, unsigned bits,
                           Sink sink) const {
    float centred[W], dz[W];
    centre<W>(held, k, centred);
    differentiate<W>(held, k, bits, centred, dz);
    if constexpr (kLeavesTails) {
      Tails<W>::keep(dz, arena.tensor<T>(1) + i, arena.tails() + i);
    } else if constexpr (kLeavesDz) {
      keep_floats<W>(arena.tensor<T>(1) + i, dz);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) sink(j, dz[j], dz[j] * centred[j]);
  }

  template <int W, class CoefficientsOf>
  BATCHOPS_DEVICE unsigned run(const Held<W>& held, int64_t at, const Range& valid,
                               CoefficientsOf k, unsigned bits) const {
    float centred[W], rest[W], dz[W];
    centre<W>(held, k, centred);
    // Before the activation, so that less is kept across it.
#pragma unroll
    for (int j = 0; j < W; ++j) rest[j] = __fmaf_rn(k(j).along, centred[j], k(j).constant);
    differentiate<W>(held, k, bits, centred, dz);
    if (wants_dresidual()) store_range<T, W>(static_cast<T*>(args.dresidual) + at, dz, valid);
    if (wants_dx()) {
#pragma unroll
      for (int j = 0; j < W; ++j) dz[j] = __fmaf_rn(k(j).affine.scale, dz[j], rest[j]);
      store_range<T, W>(static_cast<T*>(args.dx) + at, dz, valid);
    }
    return 0;
  }
};

// Σ dz · x̂ from Σ dz and Σ dz · what is scaled.
template <class T>
BATCHOPS_DEVICE float product_of(const Terms& t, const float2& sum) {
  const float product = kFolded<T> ? __fmaf_rn(-t.mean, sum.x, sum.y) : sum.y;
  return t.rstd * (product - t.low * sum.x);
}

// `folded`: for what is not centred before.
BATCHOPS_DEVICE float2 direction_of(const Terms& t, double A, double B, int64_t M, bool folded) {
  const double rstd = t.rstd;
  const double part = inverse(static_cast<double>(M));
  const double along = -rstd * rstd * B * part;
  const double mean = folded ? static_cast<double>(t.mean) + t.low : t.low;
  const double constant = -rstd * A * part - along * mean;
  return make_float2(static_cast<float>(along), static_cast<float>(constant));
}

// Each channel's sums over the part, and from them each group's: A' and B' in arena.sums().
template <class T, int W, class Walk, class Job>
BATCHOPS_DEVICE void sum_by_channel(const BackwardArguments& args, const Walk& part, const Job& job,
                                    const Arena& arena) {
  part.template sum_channels<T, W>(job, arena);
  float2* channels = arena.channels();
  for (int r = threadIdx.x; r < part.channels; r += kBlock) {
    const Terms& t = arena.terms()[part.group_of_channel(r)];
    float2 sum = channels[r];
    sum.y = product_of<T>(t, sum);
    channels[r] = sum;
    if (args.by_channel != nullptr) args.by_channel[part.first_sum + r] = sum;
  }
  __syncthreads();
  if (!args.cut.resident || args.dx == nullptr) return;
  sum_rows<1>(
      part.groups, args.cut.over_group_channels, [&](int r) { return part.channels_of_group(r); },
      [&](int) {
        return [&](auto, int c, float2& sum) {
          const float weight = args.affines.weight_of(part.channel_of(c));
          sum.x += weight * channels[c].x;
          sum.y += weight * channels[c].y;
        };
      },
      arena.slots(), arena.sums());
}

// The same of layer norm, where each element is a channel of its sample: each sample's sums at
// once, and each channel's added to arena.channel_sums() by the thread that the channel belongs to.
template <class T, int W, class Job>
BATCHOPS_DEVICE void sum_by_sample(const BackwardArguments& args, const Slices& part,
                                   const Job& job, const Arena& arena) {
  const int M = static_cast<int>(args.cut.M);
  using Coefficients = typename Job::Coefficients;
  const auto bits_of = [&](const auto& of, int i) {
    return of.masked() ? part.mask_bits(of.mask, i) : 0u;
  };
  if (args.dx != nullptr || Job::kLeavesDz) {
    sum_rows<W>(
        part.groups, args.cut.over_groups, [&](int r) { return part.range_of_group(r); },
        [&](int r) {
          return [&, r](auto width, int i, float2& sum) {
            constexpr int kWidth = decltype(width)::value;
            Coefficients k[kWidth];
            job.template make_row<kWidth>(i - part.begin - r * M, r, k);
            typename Job::template Held<kWidth> held;
            job.template load<kWidth>(held, i);
            job.template add<kWidth>(held, i, Each{k}, bits_of(job, i),
                                     [&](int j, float a, float b) {
                                       sum.x += k[j].weight * a;
                                       sum.y += k[j].weight * b;
                                     });
          };
        },
        arena.slots(), arena.sums());
    for (int r = threadIdx.x; r < part.groups; r += kBlock) {
      const Terms& t = arena.terms()[r];
      float2& sum = arena.sums()[r];
      sum.y = product_of<T>(t, sum);
    }
    __syncthreads();
  }
  if (args.by_channel == nullptr) return;
  job.when_added([&](const auto& of) {
    using Of = std::decay_t<decltype(of)>;
    for (int c = threadIdx.x * W; c < M; c += kBlock * W) {
      float* const of_dz = arena.channel_sums(0, M) + c;
      float* const of_product = arena.channel_sums(1, M) + c;
      float sums[2][W];
      to_float<float, W>(load_unit<float, W>(of_dz), sums[0]);
      to_float<float, W>(load_unit<float, W>(of_product), sums[1]);
#pragma unroll 1
      for (int r = 0; r < part.groups; ++r) {
        const int i = part.begin + r * M + c;
        const Terms& t = arena.terms()[r];
        typename Of::Coefficients k[W];
        of.template make_row<W>(c, r, k);
        typename Of::template Held<W> held;
        of.template load<W>(held, i);
        of.template add<W>(held, i, Each{k}, bits_of(of, i), [&](int j, float a, float b) {
          sums[0][j] += a;
          sums[1][j] += product_of<T>(t, make_float2(a, b));
        });
      }
      keep_floats<W>(of_dz, sums[0]);
      keep_floats<W>(of_product, sums[1]);
    }
  });
  __syncthreads();  // what comes next changes the terms
}

template <class T, int W, class Walk, class Act>
BATCHOPS_DEVICE void backward_of_part(const BackwardArguments& args, const Act& act,
                                      const Arena& arena, int64_t piece) {
  const BackwardJob<T, Act, true, !Walk::kPixels> job(args, act, arena);
  Terms* terms = arena.terms();
  using Place = typename Walk::Place;
  {
    const Walk part(args.cut, piece);
    for (int r = threadIdx.x; r < part.groups; r += kBlock) {
      terms[r] = load_terms(args.stats, args.cut.groups, part.first_group + r);
    }
    part.template keep<T, W>(arena.tensor<T>(0), static_cast<const T*>(args.x));
    part.template keep<T, W>(arena.tensor<T>(1), static_cast<const T*>(args.dy));
    if (job.adds_residual()) {
      part.template keep<T, W>(arena.tensor<T>(2), static_cast<const T*>(args.residual));
    }
    arena.leave_place<Place>(args.cut, forgotten(piece));
  }
  wait_for_copies();
  __syncthreads();
  const Walk part(args.cut, arena.place<Place>());
  if (Walk::kPixels || !args.cut.by_sample) {
    sum_by_channel<T, W>(args, part, job, arena);
  } else if constexpr (!Walk::kPixels) {
    if (args.cut.whole_samples) {
      sum_by_sample<T, decltype(job)::template kOddPiece<W>>(args, part, job, arena);
    } else {
      sum_by_sample<T, 1>(args, part, job, arena);
    }
  }
  if (!args.cut.resident) return;

  if (args.dx != nullptr) {
    float2* sums = arena.sums();
    if (args.cut.cluster()) cluster_sync();  // the others' sums are there
    for (int r = threadIdx.x; r < part.groups; r += kBlock) {
      double A = sums[r].x;
      double B = sums[r].y;
      if (args.cut.cluster()) {
        A = B = 0.0;
        for (int rank = 0; rank < args.cut.parts; ++rank) {
          const float2 sum = *of_rank(sums + r, rank);
          A += sum.x;
          B += sum.y;
        }
      }
      const float2 direction = direction_of(terms[r], A, B, args.cut.M, kFolded<T>);
      terms[r].along = direction.x;
      terms[r].constant = direction.y;
    }
    __syncthreads();
    if (args.cut.cluster()) cluster_arrive();  // their sums have been read
  }
  if (args.dx != nullptr || args.dresidual != nullptr) {
    job.when_added(
        [&](const auto& of) { Walk(args.cut, arena.place<Place>()).template apply<T, W>(of); });
  }
  __syncthreads();
  // No block leaves, or writes other sums, while others may read its own.
  if (args.cut.cluster() && args.dx != nullptr) cluster_wait();
}

// Blocks on a multiprocessor at the least. What knows its activation at run time only needs more
// than the 80 registers of two, and for others than sm_90 so does the code for whole units whose z
// is made again, before sm_80 and from sm_120 for any.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
template <class T, int W, class Act>
constexpr int kLeastBlocks = kAnyActivation<Act> || W > 1 ? 1 : kLeastResident;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <class T, int W, class Act>
constexpr int kLeastBlocks = kAnyActivation<Act> || (W > 1 && Act::kNeedsZ) ? 1 : kLeastResident;
#else
template <class T, int W, class Act>
constexpr int kLeastBlocks = kAnyActivation<Act> ? 1 : kLeastResident;
#endif

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<T, W, Act>)
    group_norm_backward(const __grid_constant__ BackwardArguments args,
                        const __grid_constant__ Act act) {
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  const Arena arena{bytes, args.shared};
  const Cut& cut = args.cut;
  for (int64_t turn = blockIdx.x; turn < cut.turns; turn += gridDim.x) {
    if (cut.by_sample) {
      for (int i = threadIdx.x; i < 2 * cut.channels; i += kBlock) {
        arena.channel_sums(0, cut.channels)[i] = 0.0f;
      }
    }
#pragma unroll 1
    for (int k = 0; k < cut.rounds; ++k) {
      const int64_t piece = turn * cut.rounds + k;
      if (piece < cut.pieces) backward_of_part<T, W, WalkOf<kLayout>>(args, act, arena, piece);
    }
    if (cut.by_sample && args.by_channel != nullptr) {
      for (int c = threadIdx.x; c < cut.channels; c += kBlock) {
        args.by_channel[turn * cut.C + c] = make_float2(arena.channel_sums(0, cut.channels)[c],
                                                        arena.channel_sums(1, cut.channels)[c]);
      }
      __syncthreads();
    }
  }
}

// Which parts of its group a channel lies in.
struct PartsOf {
  int64_t first, last;

  BATCHOPS_DEVICE PartsOf(const Cut& cut, int64_t d) : first(0), last(cut.parts - 1) {
    if (cut.pixels || cut.parts == 1) return;
    first = padded(cut, d * cut.HxW) / cut.chunk;
    last = padded(cut, (d + 1) * cut.HxW - 1) / cut.chunk;
  }
  BATCHOPS_DEVICE static int64_t padded(const Cut& cut, int64_t element) {
    if (!cut.padded) return element;
    const int64_t rows = element / cut.mask_row;
    return rows * cut.padded_row + (element - rows * cut.mask_row);
  }
};

// A block a group: its direction from its channels' sums.
__global__ void __launch_bounds__(kFinishBlock)
    group_norm_backward_finish(const __grid_constant__ BackwardArguments args) {
  const Cut& cut = args.cut;
  for (int64_t group = blockIdx.x; group < cut.groups; group += gridDim.x) {
    const int64_t n = static_cast<unsigned>(group) / static_cast<unsigned>(cut.G);
    const int64_t g = group - n * cut.G;
    double sums[2] = {};
    // Channels side by side, and parts one below the other as far as there are threads.
    const int across = static_cast<int>(cut.D < kFinishBlock ? cut.D : kFinishBlock);
    const int down = kFinishBlock / across;
    const int line = static_cast<int>(threadIdx.x) / across;
    for (int64_t d = threadIdx.x % across; d < cut.D && line < down; d += across) {
      const int64_t c = g * cut.D + d;
      const PartsOf parts(cut, d);
      double sum = 0.0;
      double product = 0.0;
#pragma unroll 4
      for (int64_t k = parts.first + line; k <= parts.last; k += down) {
        const float2 s = args.by_channel[(n * cut.parts + k) * cut.C + c];
        sum += s.x;
        product += s.y;
      }
      const double weight = args.affines.weight_of(c);
      sums[0] += weight * sum;
      sums[1] += weight * product;
    }
    block_sum<kFinishBlock>(sums);
    if (threadIdx.x == 0) {
      args.directions[group] = direction_of(load_terms(args.stats, cut.groups, group), sums[0],
                                            sums[1], cut.M, args.folded);
    }
  }
}

template <class T, Layout kLayout, int W, class Act>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<T, W, Act>)
    group_norm_backward_apply(const __grid_constant__ BackwardArguments args,
                              const __grid_constant__ Act act) {
  BATCHOPS_DYNAMIC_SHARED(bytes, unsigned char);
  const Arena arena{bytes, args.shared};
  for (int64_t i = blockIdx.x; i < args.cut.pieces; i += gridDim.x) {
    const WalkOf<kLayout> part(args.cut, args.cut.pieces - 1 - i);
    for (int r = threadIdx.x; r < part.groups; r += kBlock) {
      const int64_t group = part.first_group + r;
      Terms terms = load_terms(args.stats, args.cut.groups, group);
      if (args.dx != nullptr) {
        terms.along = args.directions[group].x;
        terms.constant = args.directions[group].y;
      }
      arena.terms()[r] = terms;
    }
    __syncthreads();
    part.template apply<T, W>(BackwardJob<T, Act, false, false>(args, act, arena));
    __syncthreads();
  }
}

// dweight and dbias: by_channel added over its rows, in order. Where there are many rows, first
// over each chunk of them.
struct ParameterArguments {
  Cut cut;
  const float2* from;  // [rows, C]
  int64_t rows;
  int64_t chunk;
  bool skips;  // rows hold only channels of their part
  float2* to;  // [chunks, C], or
  void* dweight;
  void* dbias;
  DType dtype;
};

constexpr int kParameterBlock = 256;
constexpr int kAcross = kWarp;                    // channels of a block
constexpr int kDown = kParameterBlock / kAcross;  // rows it adds at once
constexpr int64_t kMostRowChunks = 64;

__global__ void __launch_bounds__(kParameterBlock, kLeastResident)
    group_norm_backward_parameters(const __grid_constant__ ParameterArguments args) {
  BATCHOPS_SHARED(by_line, double2[kDown][kAcross]);
  const int across = threadIdx.x % kAcross;
  const int down = threadIdx.x / kAcross;
  const int64_t C = args.cut.C;
  const int64_t tiles = ceil_divide<int64_t>(C, kAcross);
  const int64_t chunks = ceil_divide(args.rows, args.chunk);
  for (int64_t piece = blockIdx.x; piece < tiles * chunks; piece += gridDim.x) {
    const int64_t k = piece / tiles;
    const int64_t c = (piece - k * tiles) * kAcross + across;
    double2 sum = make_double2(0.0, 0.0);
    if (c < C) {
      const PartsOf parts(args.cut, args.skips ? c % args.cut.D : 0);
      const int64_t end = (k + 1) * args.chunk < args.rows ? (k + 1) * args.chunk : args.rows;
      int64_t row = k * args.chunk + down;
      // Of the row among its sample's; a division once rather than at each row.
      int slot = args.skips ? static_cast<int>(row % args.cut.parts) : 0;
      const int slots_on = args.skips ? kDown % args.cut.parts : 0;
#pragma unroll 4
      for (; row < end; row += kDown) {
        const bool counts = slot >= parts.first && slot <= parts.last;
        slot += slots_on;
        if (args.skips && slot >= args.cut.parts) slot -= args.cut.parts;
        if (args.skips && !counts) continue;
        const float2 s = args.from[row * C + c];
        sum.x += s.x;
        sum.y += s.y;
      }
    }
    by_line[down][across] = sum;
    __syncthreads();
    if (down == 0 && c < C) {
      for (int line = 1; line < kDown; ++line) {
        sum.x += by_line[line][across].x;
        sum.y += by_line[line][across].y;
      }
      if (args.to != nullptr) {
        args.to[k * C + c] = make_float2(static_cast<float>(sum.x), static_cast<float>(sum.y));
      } else {
        if (args.dbias != nullptr) store_as(args.dbias, args.dtype, c, sum.x);
        if (args.dweight != nullptr) store_as(args.dweight, args.dtype, c, sum.y);
      }
    }
    __syncthreads();
  }
}

constexpr const char* kOperation = "group_norm_backward_cuda";

Purpose purpose_of(const GroupNormShape& shape, bool residual, bool mask) {
  const int size = static_cast<int>(size_of(shape.dtype));
  return {residual ? 3 : 2, size, true, mask, is_tailed(shape, mask) && !is_layer_norm(shape)};
}

// The workspace: by_channel [rows, C], chunks of it, directions [groups]; all float2.
struct Workspace {
  int64_t rows, chunk, chunks;
  int64_t directions;

  explicit Workspace(const Cut& cut) : rows(cut.sum_rows), chunk(rows), chunks(0) {
    if (rows > 2 * kMostRowChunks) {
      chunk = ceil_divide(rows, kMostRowChunks);
      chunks = ceil_divide(rows, chunk);
    }
    directions = cut.resident ? 0 : cut.groups;
  }
  int64_t entries(int64_t C) const { return (rows + chunks) * C + directions; }
};

const char* parameters(const GroupNormBackward& args, const Cut& cut, const Workspace& space,
                       float2* workspace, int device, void* stream) {
  if (args.dweight == nullptr && args.dbias == nullptr) return nullptr;
  ParameterArguments to{
      cut,     workspace,    space.rows, space.chunk,           !cut.pixels && cut.parts > 1,
      nullptr, args.dweight, args.dbias, args.shape.param_dtype};
  const auto run = [&]() -> const char* {
    const int64_t pieces = ceil_divide<int64_t>(cut.C, kAcross) * ceil_divide(to.rows, to.chunk);
    int64_t blocks = 0;
    if (const char* error = grid_size(kOperation, device, pieces, blocks)) return error;
    return launch("group_norm_backward_parameters", group_norm_backward_parameters, blocks,
                  kParameterBlock, 0, stream, to);
  };
  if (space.chunks > 0) {
    to.to = workspace + space.rows * cut.C;
    if (const char* error = run()) return error;
    to.from = to.to;
    to.to = nullptr;
    to.rows = to.chunk = space.chunks;
    to.skips = false;
  }
  return run();
}

// Whether z is made again from x, and from the residual.
bool recomputes_z(const GroupNormBackward& args) {
  return traits_of(args.shape.activation).needs_z && args.mask == nullptr;
}

// On what `found` has.
const char* backward(const GroupNormBackward& args, void* workspace, const Device& found,
                     int device, void* stream, bool& refused) {
  const GroupNormShape& shape = args.shape;
  const bool wants_parameters = args.dweight != nullptr || args.dbias != nullptr;
  const bool wants_elements = args.dx != nullptr || args.dresidual != nullptr;
  if (!wants_parameters && !wants_elements) return nullptr;
  const bool recomputes = recomputes_z(args);
  const void* residual = recomputes ? args.residual : nullptr;

  const auto run = [&](auto type, auto layout, auto width, auto act) -> const char* {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    constexpr Layout kLayout = decltype(layout)::value;
    using Act = decltype(act);
    const Purpose purpose = purpose_of(shape, residual != nullptr, args.mask != nullptr);
    BackwardArguments to{};
    to.cut = make_cut(shape, purpose, W, found);
    to.shared = plan_shared(to.cut, purpose, W);
    const Workspace space(to.cut);
    auto* places = static_cast<float2*>(workspace);
    to.dy = args.dy;
    to.x = args.x;
    to.residual = residual;
    to.mask = args.mask;
    to.dx = args.dx;
    to.dresidual = args.dresidual;
    to.stats = static_cast<const float*>(args.stats);
    to.by_channel = !to.cut.resident || wants_parameters ? places : nullptr;
    to.directions = places + (space.rows + space.chunks) * to.cut.C;
    to.affines = affines_of(args.weight, args.bias, shape.param_dtype);
    to.recomputes = recomputes;
    to.folded = kFolded<T>;

    const bool sums = to.cut.resident || wants_parameters || args.dx != nullptr;
    if (sums) {
      if (const char* error = launch_parts(kOperation, "group_norm_backward",
                                           group_norm_backward<T, kLayout, W, Act>, to, act, device,
                                           stream, refused)) {
        return error;
      }
      if (refused) return nullptr;
    }
    int64_t blocks = 0;
    if (!to.cut.resident && args.dx != nullptr) {
      if (const char* error = grid_size(kOperation, device, to.cut.groups, blocks)) return error;
      if (const char* error = launch("group_norm_backward_finish", group_norm_backward_finish,
                                     blocks, kFinishBlock, 0, stream, to)) {
        return error;
      }
    }
    if (!to.cut.resident && wants_elements) {
      to.shared = plan_apply(to.cut, true);
      LaunchShape grid;
      if (const char* error = apply_shape(kOperation, to, device, grid)) return error;
      if (const char* error =
              launch("group_norm_backward_apply", group_norm_backward_apply<T, kLayout, W, Act>,
                     grid, stream, to, act)) {
        return error;
      }
    }
    return parameters(args, to.cut, space, places, device, stream);
  };
  return dispatch(kOperation, shape, args.mask != nullptr,
                  {args.dy, args.x, residual, args.dx, args.dresidual}, run,
                  is_tailed(shape, args.mask != nullptr) && is_layer_norm(shape));
}

}  // namespace group_norm_backward_cu
}  // namespace batchops::cuda

namespace batchops {

size_t group_norm_backward_workspace_cuda(const GroupNormBackward& args, int device) {
  const GroupNormShape& shape = args.shape;
  if (shape.numel() == 0 || shape.dtype == DType::f64) return 0;
  cuda::Device found;
  if (cuda::query(cuda::kOperation, device, found) != nullptr) return 0;
  const bool residual = cuda::recomputes_z(args) && args.residual != nullptr;
  const auto purpose = cuda::purpose_of(shape, residual, args.mask != nullptr);
  int64_t entries = 2;
  cuda::group::for_each_cut(shape, purpose, found, [&](const cuda::group::Cut& cut) {
    entries = std::max(entries, cuda::Workspace(cut).entries(shape.C));
  });
  return static_cast<size_t>(entries) * sizeof(float2);
}

const char* group_norm_backward_cuda(const GroupNormBackward& args, void* workspace, int device,
                                     void* stream) {
  if (args.shape.numel() == 0) return nullptr;
  cuda::Device found;
  if (const char* error = cuda::query(cuda::kOperation, device, found)) return error;
  if (const char* error = cuda::group::validate(cuda::kOperation, args.shape, args.mask)) {
    return error;
  }
  if (args.dy == nullptr || args.x == nullptr || args.stats == nullptr || workspace == nullptr) {
    return cuda::message("%s: dy, x, stats and workspace must not be null", cuda::kOperation);
  }
  return cuda::group::with_fallback(found, [&](const cuda::Device& on, bool& refused) {
    return cuda::backward(args, workspace, on, device, stream, refused);
  });
}

}  // namespace batchops
