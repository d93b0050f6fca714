// Forward: y = activation(z), after the statistics.

template <class S, class Act, bool kResidual, bool kMask>
struct ForwardPass : Statistics<S> {
  using Base = Statistics<S>;
  using T = typename Base::T;
  using V = typename Base::V;
  using P = typename Base::P;
  using Column = EachColumn<T, S>;
  using Base::args, Base::geometry, Base::stats, Base::x, Base::L;

  const S* const residual = static_cast<const S*>(args.residual);
  S* const y = static_cast<S*>(args.y);
  const Act act = activation_of<Act>(args.shape);
  const bool past_cache = streams(args.shape);

  BATCHOPS_INLINE void write_pair(int64_t at, P mean, P scale, P shift, bool past) const {
    P z = normalize(load<T>(x + at, Two{}), mean, scale, shift);
    if constexpr (kResidual) z = z + load<T>(residual + at, Two{});
    put(y + at, activation(act, z), Two{}, past);
  }

  // R runs of n elements, `stride` apart, with the same channel values.
  template <int R, class Param>
  BATCHOPS_INLINE void apply_run(int64_t offset, int64_t stride, uint8_t* const* mask, int64_t n,
                                 Param mean, Param scale, Param shift, int64_t ahead) const {
    const S* const from = x + offset;
    const S* const added = kResidual ? residual + offset : nullptr;
    S* const to = y + offset;
    int64_t start = 0;
    bool past = past_cache;
    uint64_t bits[R] = {};
    const auto vector = [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
      const P mean_j = mean[j], scale_j = scale[j], shift_j = shift[j];
      for (int k = 0; k < R; ++k) {
        const int64_t at = k * stride + j;
        if (ahead > 0) prefetch_ahead<T>(from, at, lanes, ahead);
        if constexpr (kResidual) prefetch_ahead<T>(added, at, lanes);
        P z = normalize(load<T>(from + at, lanes), mean_j, scale_j, shift_j);
        if constexpr (kResidual) z = z + load<T>(added + at, lanes);
        if constexpr (kMask) bits[k] |= positive_bits_of<S>(mask_source(act, z)) << (u * 2 * L);
        put(to + at, activation(act, z), lanes, past);
      }
    };
    if (past && !can_stream<T>(to)) {
      if (kMask || R > 1 || !Param::kAnywhere) {
        past = false;  // mask bytes, and pairs of columns, begin at the first element
      } else {
        start = std::min(to_boundary<T>(to), n);
        vector(0, Rest{start}, 0);
      }
    }
    for_pair_blocks<T>(
        start, n,
        [&](int64_t, auto) BATCHOPS_INLINE_LAMBDA {
          for (int k = 0; k < R; ++k) bits[k] = 0;
        },
        vector,
        [&](int64_t j, auto bytes) BATCHOPS_INLINE_LAMBDA {
          if constexpr (kMask) {
            for (int k = 0; k < R; ++k) {
              if constexpr (std::is_same_v<decltype(bytes), int>) bits[k] &= valid_bits(n - j);
              write_bits(mask[k] + j / 8, bits[k], bytes);
            }
          }
        });
  }
  // Lanes past the end of a run must leave no bits.
  static BATCHOPS_INLINE uint64_t valid_bits(int64_t left) {
    return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }

  void apply(int64_t g, int64_t chunk_begin, int64_t chunk_end) const {
    if (geometry.plan.by_rows) {
      apply_rows(g, chunk_begin, chunk_end);
    } else {
      apply_planes(g, chunk_begin, chunk_end);
    }
  }

  void affine(int64_t first, int64_t count, T* mean, T* scale, T* shift) const {
    affine_of(stats, args.weight, args.bias, args.shape.param_dtype, first, count, mean, scale,
              shift);
  }

  void apply_planes(int64_t c, int64_t chunk_begin, int64_t chunk_end) const {
    T mean, scale, shift;
    affine(c, 1, &mean, &scale, &shift);
    const OneChannel<T> means(&mean), scales(&scale), shifts(&shift);
    for (int64_t chunk = chunk_end; chunk-- > chunk_begin;) {
      for (int64_t step = geometry.first_step(chunk); step < geometry.end_step(chunk); ++step) {
        const auto piece = geometry.piece(c, step);
        uint8_t* mask = args.mask + (kMask ? piece.mask : 0);
        apply_run<1>(piece.offset, 0, &mask, piece.length, means, scales, shifts,
                     geometry.template ahead_again<S>(1, c, step, geometry.end_step(chunk), piece));
      }
    }
  }

  // Whether whole vectors can go through memory in order, whatever plane they belong to. The mask
  // cannot: it pads every plane to whole bytes.
  bool in_order() const {
    return !kMask && args.shape.layout == Layout::channels_first && args.shape.HxW >= L;
  }

  // Elements [begin, end) in the order of memory, by vectors that end where one of y ends: those
  // on the border of two planes take the channel values of both. `mean`, `scale` and `shift` hold
  // all channels.
  void apply_in_order(int64_t begin, int64_t end, const T* mean, const T* scale,
                      const T* shift) const {
    struct {
      V mean, scale, shift;
    } now, before;
    const int64_t HxW = args.shape.HxW, C = args.shape.C;
    int64_t c = begin / HxW % C, plane_end = (begin / HxW + 1) * HxW;
    const auto enter = [&]()
                           BATCHOPS_INLINE_LAMBDA { now = {V(mean[c]), V(scale[c]), V(shift[c])}; };
    const auto write = [&](int64_t j, auto lanes, V m, V a, V b) BATCHOPS_INLINE_LAMBDA {
      V z = normalize(load<T>(x + j, lanes), m, a, b);
      if constexpr (kResidual) z = z + load<T>(residual + j, lanes);
      put(y + j, act.forward(z), lanes, past_cache);
    };
    const auto next_plane = [&]() BATCHOPS_INLINE_LAMBDA {
      if (++c == C) c = 0;
      plane_end += HxW;
      enter();
    };
    const auto write_border = [&](int64_t j, auto lanes) BATCHOPS_INLINE_LAMBDA {
      const int64_t left = plane_end - j;
      before = now;
      next_plane();
      write(j, lanes, first_of(left, before.mean, now.mean),
            first_of(left, before.scale, now.scale), first_of(left, before.shift, now.shift));
    };
    const auto write_part = [&](int64_t j, int64_t n) BATCHOPS_INLINE_LAMBDA {
      if (j + n <= plane_end) {
        write(j, First{n}, now.mean, now.scale, now.shift);
      } else {
        write_border(j, First{n});
      }
    };
    int64_t j = begin;
    enter();
    if (const int64_t head = std::min(to_boundary<T>(y + begin), end - begin); head != 0) {
      write_part(j, head);
      j += head;
    }
    while (true) {
      const int64_t stop = plane_end < end ? plane_end : end;
      if constexpr (kSwapped<S>) {
        for (; j + 2 * L <= stop; j += 2 * L) {
          prefetch(x, j + kAhead<S>);
          write_pair(j, now.mean, now.scale, now.shift, past_cache);
        }
      }
      for (; j + L <= stop; j += L) {
        prefetch(x, j + kAhead<S>);
        write(j, All{}, now.mean, now.scale, now.shift);
      }
      if (j + L > end) break;
      if (j == plane_end) {
        next_plane();
      } else {
        write_border(j, All{});
        j += L;
      }
    }
    if (j < end) write_part(j, end - j);
  }

  void apply_rows(int64_t g, int64_t chunk_begin, int64_t chunk_end) const {
    const Group group = geometry.group(g);
    Columns<T> mean, scale, shift;
    {
      T channel[3][kMaxWidth];
      affine(group.first_channel, group.channels, channel[0], channel[1], channel[2]);
      geometry.spread(group, channel[0], mean.at);
      geometry.spread(group, channel[1], scale.at);
      geometry.spread(group, channel[2], shift.at);
    }
    for (T* at : {mean.at, scale.at, shift.at}) in_pair_order<S>(at, group.width);
    const Column means(mean.at), scales(scale.at), shifts(shift.at);
    const BatchNormPlan& plan = geometry.plan;
    // In eval mode x comes from memory, where strictly ascending reads are worth more.
    const bool together = writes_rows_together(args.shape) && args.training;
    for (int64_t chunk = chunk_end; chunk-- > chunk_begin;) {
      const int64_t end = geometry.end_step(chunk);
      int64_t step = geometry.first_step(chunk);
      if (together) {
        const int64_t full_end = end - (plan.tail > 0 && end == plan.steps);
        for (; step + 2 <= full_end; step += 2) {
          apply_row<2>(g, group, step, means, scales, shifts);
        }
      }
      for (; step < end; ++step) apply_row<1>(g, group, step, means, scales, shifts);
    }
  }

  template <int R>
  BATCHOPS_INLINE void apply_row(int64_t g, const Group& group, int64_t step, Column mean,
                                 Column scale, Column shift) const {
    const auto row = geometry.row(g, group, step);
    const bool padded = kMask && row.runs > 1 && row.run % 8 != 0;
    FlatBits flat[kMask ? R : 1];
    uint8_t* mask[R] = {};
    uint8_t* to[R] = {};
    if (kMask) {
      for (int k = 0; k < R; ++k) {
        mask[k] = args.mask + geometry.row(g, group, step + k).mask;
        to[k] = padded ? flat[k].at : mask[k];
      }
    }
    apply_run<R>(row.offset, geometry.plan.row_stride, to, row.width, mean, scale, shift,
                 geometry.rereads() ? kAhead<S> : 0);
    if (padded) {
      for (int k = 0; k < R; ++k) pad_runs(mask[k], flat[k].at, row.runs, row.run);
    }
  }
};

template <class Pass>
inline const char* run_forward(const BatchNormForward& args, const Geometry& geometry,
                               const Parallel& par, const ChannelStats<typename Pass::T>& stats,
                               double* moments) {
  using T = typename Pass::T;
  Pass pass{{args, geometry, stats, moments}};
  if (!args.have_stats) {
    if (args.training) return reduce_and_apply(geometry, par, pass, true);
    pass.take_running_stats();
  }
  if (!pass.in_order()) return apply_only(geometry, par, pass);

  const int64_t C = args.shape.C, numel = args.shape.numel();
  T few[3 * 256];
  std::unique_ptr<T[]> many(C > 256 ? new (std::nothrow) T[3 * C] : nullptr);
  if (C > 256 && many == nullptr) return "batch_norm: out of memory for the channel values";
  T* const mean = C > 256 ? many.get() : few;
  pass.affine(0, C, mean, mean + C, mean + 2 * C);
  constexpr int64_t kPart = 4096;
  par((numel + kPart - 1) / kPart, [&](int64_t begin, int64_t end) {
    pass.apply_in_order(begin * kPart, end * kPart < numel ? end * kPart : numel, mean, mean + C,
                        mean + 2 * C);
    fence();
  });
  return nullptr;
}

template <class S, class Act>
inline const char* forward_of(const BatchNormForward& args, const Geometry& geometry,
                              const Parallel& par, const ChannelStats<AccOf<S>>& stats,
                              double* moments) {
  if (args.residual == nullptr) {
    return run_forward<ForwardPass<S, Act, false, false>>(args, geometry, par, stats, moments);
  }
  if constexpr (Act::kMaskable) {
    if (args.mask != nullptr) {
      return run_forward<ForwardPass<S, Act, true, true>>(args, geometry, par, stats, moments);
    }
  }
  return run_forward<ForwardPass<S, Act, true, false>>(args, geometry, par, stats, moments);
}

// The samples of `part` share statistics: ghost batch k of `whole`.
inline const char* forward_ghost(const BatchNormForward& part, const BatchNormForward& whole,
                                 int64_t k, const Parallel& par, double* moments) {
  const Geometry geometry(part.shape);
  const Parallel& runner = part.shape.numel() < kForkElements ? Parallel{} : par;
  const char* error = nullptr;
  with_element(part.shape.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ChannelStats<AccOf<S>> stats(whole.stats, whole.shape, k);
    with_instance<S, Identity, Relu>(part.shape, [&](auto act) {
      error = forward_of<S, decltype(act)>(part, geometry, runner, stats, moments);
    });
  });
  return error;
}

inline const char* forward_ghosts(const BatchNormForward& args, const Parallel& par) {
  const BatchNormShape& shape = args.shape;
  const int64_t ghosts = shape.ghosts(), C = shape.C;
  const bool update =
      !args.have_stats && (args.running_mean != nullptr || args.running_var != nullptr);
  // [ghost][mean, M2][channel]
  std::unique_ptr<double[]> moments(update ? new (std::nothrow) double[ghosts * 2 * C] : nullptr);
  if (update && moments == nullptr) return "batch_norm: out of memory for the ghost batches";
  const char* error = for_each_ghost(
      args, par, [&](const BatchNormForward& part, int64_t k, const Parallel& runner) {
        return forward_ghost(part, args, k, runner, update ? moments.get() + k * 2 * C : nullptr);
      });
  if (error != nullptr || !update) return error;
  for_each_channel_block(C, ghosts, par, [&](int64_t first, int64_t count) {
    double* const mean = moments.get() + first;
    double* const m2 = mean + C;
    for (int64_t k = 1; k < ghosts; ++k) {
      const double n = static_cast<double>(shape.first_sample(k) * shape.HxW);
      const double m = static_cast<double>(shape.first_sample(k + 1) * shape.HxW) - n;
      const double* const other = mean + k * 2 * C;
      for (int64_t i = 0; i < count; ++i) {
        merge_moments(n, m, mean[i], m2[i], other[i], other[C + i]);
      }
    }
    update_running(args, first, count, static_cast<double>(shape.N * shape.HxW), mean, m2);
  });
  return nullptr;
}

const char* batch_norm_forward(const BatchNormForward& args, const Parallel& par) {
  if (args.mask != nullptr &&
      (args.residual == nullptr || !traits_of(args.shape.activation).maskable)) {
    return "batch_norm: expected a mask only with a residual and an activation that one bit an "
           "element can stand for";
  }
  return args.shape.ghosts() > 1 ? forward_ghosts(args, par)
                                 : forward_ghost(args, args, 0, par, nullptr);
}
