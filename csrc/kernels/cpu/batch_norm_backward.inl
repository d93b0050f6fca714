// Backward: Σ dz and Σ dz · (x - mean), then dx and dresidual.
//
// With Q = Σ dz · (x - mean), dweight = Q · rstd and the formula of batch_norm.h regrouped:
//
//   dx = scale · dz + slope · (x - hi) + offset,   scale = weight · rstd,   mean = hi + low
//   slope = -scale · rstd² · Q / M,   offset = -scale · Σ dz / M - slope · low

// What dz = dy · activation'(z) is made from.
enum class Derivative { one, recomputed, bits };

// What the sums of a channel come to.
template <class T>
struct BackwardResults {
  const BatchNormBackward& args;
  const Geometry& geometry;
  const ChannelStats<const T> stats;
  double* const sums;     // dweight [C], dbias [C] of a ghost batch; null: the outputs themselves
  T* const coefficients;  // slope [C], offset [C]

  void merge(int64_t, int64_t count, double* dz, double* dz_x, const double* chunk_dz,
             const double* chunk_dz_x) const {
    for (int64_t i = 0; i < count; ++i) dz[i] += chunk_dz[i];
    for (int64_t i = 0; i < count; ++i) dz_x[i] += chunk_dz_x[i];
  }

  BATCHOPS_NOINLINE void finish(int64_t first, int64_t count, const double* dz,
                                const double* dz_x) const {
    const int64_t C = args.shape.C;
    const double inverse = 1.0 / static_cast<double>(args.shape.N * args.shape.HxW);
    constexpr int64_t kPart = 128;
    T mean[kPart], scale[kPart], shift[kPart];
    double dweight[kPart];
    for (int64_t part = 0; part < count; part += kPart) {
      const int64_t c = first + part, n = count - part < kPart ? count - part : kPart;
      affine_of(stats, args.weight, nullptr, args.shape.param_dtype, c, n, mean, scale, shift);
      for (int64_t i = 0; i < n; ++i) {
        const double low = stats.low[c + i], rstd = stats.rstd[c + i];
        dweight[i] = (dz_x[part + i] - low * dz[part + i]) * rstd;
        const double slope = -scale[i] * rstd * dweight[i] * inverse;
        coefficients[c + i] = static_cast<T>(slope);
        coefficients[C + c + i] = static_cast<T>(-scale[i] * dz[part + i] * inverse - slope * low);
      }
      if (sums == nullptr) {
        write_channels(args.dweight, args.shape.param_dtype, c, n, dweight);
        write_channels(args.dbias, args.shape.param_dtype, c, n, dz + part);
      } else {
        std::memcpy(sums + c, dweight, n * sizeof(double));
        std::memcpy(sums + C + c, dz + part, n * sizeof(double));
      }
    }
  }
};

template <class S, class Act, Derivative kDerivative>
struct BackwardSums : BackwardResults<AccOf<S>> {
  using T = AccOf<S>;
  using Base = BackwardResults<T>;
  using Base::args, Base::geometry, Base::stats, Base::merge;
  using P = Pair<T>;
  using Column = EachColumn<T, S>;
  static constexpr int L = Vec<T>::kLanes;
  static constexpr bool kBits = kDerivative == Derivative::bits;
  static constexpr bool kRecomputed = kDerivative == Derivative::recomputed;
  static constexpr bool kMayAdd = std::is_same_v<Act, GenericActivation>;

  const S* const x = static_cast<const S*>(args.x);
  const S* const dy = static_cast<const S*>(args.dy);
  const S* const residual = residual_of<S>(args);
  const Act act = activation_of<Act>(args.shape);

  template <class Lanes, class Param>
  BATCHOPS_INLINE P derivative(const S* from, int64_t j, Lanes lanes, int u, uint64_t bits, P value,
                               Param mean, Param scale, Param shift) const {
    const P gradient = load<T>(from + j, lanes);
    if constexpr (kBits) return derivative_of_bits<S>(act, gradient, bits, u);
    if constexpr (kRecomputed) {
      P z = normalize(value, mean[j], scale[j], shift[j]);
      if constexpr (kMayAdd) {
        if (residual != nullptr) z = z + load<T>(residual + (from - dy) + j, lanes);
      }
      return derivative_of(act, gradient, z);
    }
    return gradient;
  }

  void affine(int64_t first, int64_t count, T* mean, T* scale, T* shift) const {
    affine_of(stats, args.weight, kRecomputed ? args.bias : nullptr, args.shape.param_dtype, first,
              count, mean, scale, shift);
  }

  // --------------------------------------------------------------------- sums

  void reduce(int64_t g, int64_t chunk, double* dz, double* dz_x) const {
    if (geometry.plan.by_rows) {
      reduce_rows(g, chunk, dz, dz_x);
    } else {
      reduce_planes(g, chunk, *dz, *dz_x);
    }
  }

  void reduce_planes(int64_t c, int64_t chunk, double& dz, double& dz_x) const {
    T mean, scale, shift;
    affine(c, 1, &mean, &scale, &shift);
    const OneChannel<T> means(&mean), scales(&scale), shifts(&shift);
    const int64_t end = geometry.end_step(chunk);
    const P zero(Vec<T>(T(0)));
    P s[2] = {zero, zero}, q[2] = {zero, zero};
    int64_t pending = 0;
    dz = dz_x = 0;
    for (int64_t step = geometry.first_step(chunk); step < end; ++step) {
      const auto piece = geometry.piece(c, step);
      const S* p = x + piece.offset;
      const S* gradient = dy + piece.offset;
      const int64_t ahead = geometry.template ahead<S>(c, step, end, piece);
      uint64_t bits = 0;
      for_pair_blocks<T>(
          0, piece.length,
          [&](int64_t j, auto bytes) BATCHOPS_INLINE_LAMBDA {
            if constexpr (kBits) bits = read_bits(args.mask + piece.mask + j / 8, bytes);
          },
          [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
            prefetch_ahead<T>(p, j, lanes, ahead);
            prefetch_ahead<T>(gradient, j, lanes, ahead);
            const P value = load<T>(p + j, lanes);
            const P d = derivative(gradient, j, lanes, u, bits, value, means, scales, shifts);
            s[u] = s[u] + d;
            q[u] = fma(d, value - means[j], q[u]);
          },
          [](int64_t, auto) {});
      pending += piece.length;
      if (pending < kPieceElements && step + 1 < end) continue;
      dz += sum(s[0] + s[1]);
      dz_x += sum(q[0] + q[1]);
      for (int u = 0; u < 2; ++u) s[u] = q[u] = zero;
      pending = 0;
    }
  }

  void reduce_rows(int64_t g, int64_t chunk, double* dz, double* dz_x) const {
    const Group group = geometry.group(g);
    const int64_t begin = geometry.first_step(chunk), end = geometry.end_step(chunk);
    const BatchNormPlan& plan = geometry.plan;
    const int64_t full_end = plan.tail > 0 && end == plan.steps ? end - 1 : end;
    const bool together = reads_rows_together(plan, args.shape, 2);
    Columns<T> mean, scale, shift, s, q;
    Sums row_sums;
    columns_of(group, mean, scale, shift);
    const Column means(mean.at), scales(scale.at), shifts(shift.at);
    for (int64_t c = 0; c < group.channels; ++c) dz[c] = dz_x[c] = 0;
    for (int64_t step = begin; step < end;) {
      // The short last row is folded alone: its columns have fewer values.
      const int64_t stop = step >= full_end                  ? end
                           : full_end - step > kRowsPerFlush ? step + kRowsPerFlush
                                                             : full_end;
      for (int64_t j = 0; j < group.width; j += 2 * L) {
        store_pair(s.at + j, P(Vec<T>(T(0))));
        store_pair(q.at + j, P(Vec<T>(T(0))));
      }
      int64_t width = group.width;
      for (; together && step + 2 <= stop; step += 2) {
        add_rows<2>(g, group, step, means, scales, shifts, s.at, q.at);
      }
      for (; step < stop; ++step) {
        width = add_rows<1>(g, group, step, means, scales, shifts, s.at, q.at);
      }
      in_element_order<S>(s.at, width);
      in_element_order<S>(q.at, width);
      geometry.fold(group, s.at, width, row_sums.first);
      geometry.fold(group, q.at, width, row_sums.second);
      merge(0, group.channels, dz, dz_x, row_sums.first, row_sums.second);
    }
  }

  template <int R>
  BATCHOPS_INLINE int64_t add_rows(int64_t g, const Group& group, int64_t step, Column mean,
                                   Column scale, Column shift, T* s, T* q) const {
    const auto row = geometry.row(g, group, step);
    const int64_t stride = geometry.plan.row_stride;
    const bool far = geometry.plan.segment > 1;  // the hardware does not see the next rows coming
    FlatBits flat[kBits ? R : 1];
    const uint8_t* mask[R] = {};
    masks_of<R>(g, group, step, mask, flat);
    const S* const p = x + row.offset;
    const S* const gradient = dy + row.offset;
    uint64_t bits[R] = {};
    for_pair_blocks<T>(
        0, row.width,
        [&](int64_t j, auto bytes) BATCHOPS_INLINE_LAMBDA {
          if constexpr (kBits) {
            for (int k = 0; k < R; ++k) bits[k] = read_bits(mask[k] + j / 8, bytes);
          }
        },
        [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
          P sum_j = load_pair(s + j), product_j = load_pair(q + j);
          for (int k = 0; k < R; ++k) {
            if (far) {
              prefetch_pair<T>(p, (k + R) * stride + j);
              prefetch_pair<T>(gradient, (k + R) * stride + j);
            } else if (R > 1) {
              prefetch_pair<T>(p, R * (stride + j) + k * 2 * L);
              prefetch_pair<T>(gradient, R * (stride + j) + k * 2 * L);
            } else {
              prefetch_ahead<T>(p, j, lanes);
              prefetch_ahead<T>(gradient, j, lanes);
            }
            const P value = load<T>(p + k * stride + j, lanes);
            const P d =
                derivative(gradient + k * stride, j, lanes, u, bits[k], value, mean, scale, shift);
            sum_j = sum_j + d;
            product_j = fma(d, value - mean[j], product_j);
          }
          store_pair(s + j, sum_j);
          store_pair(q + j, product_j);
        },
        [](int64_t, auto) {});
    return row.width;
  }

  void columns_of(const Group& group, Columns<T>& mean, Columns<T>& scale,
                  Columns<T>& shift) const {
    T channel[3][kMaxWidth];
    affine(group.first_channel, group.channels, channel[0], channel[1], channel[2]);
    geometry.spread(group, channel[0], mean.at);
    geometry.spread(group, channel[1], scale.at);
    in_pair_order<S>(mean.at, group.width);
    in_pair_order<S>(scale.at, group.width);
    if (!kRecomputed) return;
    geometry.spread(group, channel[2], shift.at);
    in_pair_order<S>(shift.at, group.width);
  }

  template <int R>
  BATCHOPS_INLINE void masks_of(int64_t g, const Group& group, int64_t step, const uint8_t** mask,
                                FlatBits* flat) const {
    if constexpr (kBits) {
      for (int k = 0; k < R; ++k) {
        const auto row = geometry.row(g, group, step + k);
        mask[k] = args.mask + row.mask;
        if (row.runs == 1 || row.run % 8 == 0) continue;
        join_runs(flat[k].at, mask[k], row.runs, row.run);
        mask[k] = flat[k].at;
      }
    }
  }
};

// Which of the two formulas of dx an instance is for.
enum class Mode { training, eval, either };

template <class S, class Act, Derivative kDerivative, Mode kMode>
struct BackwardPass : BackwardSums<S, Act, kDerivative> {
  using Base = BackwardSums<S, Act, kDerivative>;
  using T = typename Base::T;
  using P = typename Base::P;
  using Column = typename Base::Column;
  using Base::args, Base::geometry, Base::coefficients, Base::x, Base::dy;
  using Base::kBits, Base::kRecomputed, Base::L;

  S* const dx = static_cast<S*>(args.dx);
  S* const dresidual = static_cast<S*>(args.dresidual);
  const bool training = kMode == Mode::either ? args.training : kMode == Mode::training;
  const bool past_cache = streams(args.shape);

  // R runs of n elements, `stride` apart, with the same channel values.
  template <int R, class Param>
  BATCHOPS_INLINE void apply_run(int64_t offset, int64_t stride, const uint8_t* const* mask,
                                 int64_t n, Param mean, Param scale, Param shift, Param slope,
                                 Param extra, int64_t ahead) const {
    const S* const p = x + offset;
    const S* const gradient = dy + offset;
    S* const to = dx == nullptr ? nullptr : dx + offset;
    S* const to_residual = dresidual == nullptr ? nullptr : dresidual + offset;
    S* const aligned = to != nullptr ? to : to_residual;
    bool past = past_cache;
    bool past_residual = past_cache;
    int64_t start = 0;
    uint64_t bits[R] = {};
    const bool centred = kMode == Mode::either ? training : kMode == Mode::training;
    const auto vector = [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
      const P scale_j = scale[j];
      for (int k = 0; k < R; ++k) {
        const int64_t at = k * stride + j;
        if (ahead > 0) prefetch_ahead<T>(gradient, at, lanes, ahead);
        P value(Vec<T>(T(0)));
        if (kRecomputed || centred) {
          if (ahead > 0) prefetch_ahead<T>(p, at, lanes, ahead);
          value = load<T>(p + at, lanes);
        }
        const P dz = this->derivative(gradient + k * stride, j, lanes, u, bits[k], value, mean,
                                      scale, shift);
        if (to_residual != nullptr) put(to_residual + at, dz, lanes, past_residual);
        if (to != nullptr) {
          P d = scale_j * dz;
          if (centred) d = fma(scale_j, dz, fma(slope[j], value - mean[j], extra[j]));
          put(to + at, d, lanes, past);
        }
      }
    };
    if (past && !can_stream<T>(aligned)) {
      if (kBits || R > 1 || !Param::kAnywhere) {
        past = past_residual = false;  // mask bytes, and pairs of columns, begin at the first
      } else {
        start = std::min(to_boundary<T>(aligned), n);
        vector(0, Rest{start}, 0);
      }
    }
    if (to != nullptr && to_residual != nullptr && !can_stream<T>(to_residual + start)) {
      past_residual = false;
    }
    for_pair_blocks<T>(
        start, n,
        [&](int64_t j, auto bytes) BATCHOPS_INLINE_LAMBDA {
          if constexpr (kBits) {
            for (int k = 0; k < R; ++k) bits[k] = read_bits(mask[k] + j / 8, bytes);
          }
        },
        vector, [](int64_t, auto) {});
  }

  void apply(int64_t g, int64_t chunk_begin, int64_t chunk_end) const {
    if (geometry.plan.by_rows) {
      apply_rows(g, chunk_begin, chunk_end);
    } else {
      apply_planes(g, chunk_begin, chunk_end);
    }
  }

  void apply_planes(int64_t c, int64_t chunk_begin, int64_t chunk_end) const {
    T mean, scale, shift;
    this->affine(c, 1, &mean, &scale, &shift);
    const OneChannel<T> means(&mean), scales(&scale), shifts(&shift);
    const OneChannel<T> slopes(coefficients + c), extras(coefficients + args.shape.C + c);
    for (int64_t chunk = chunk_end; chunk-- > chunk_begin;) {
      for (int64_t step = geometry.first_step(chunk); step < geometry.end_step(chunk); ++step) {
        const auto piece = geometry.piece(c, step);
        const uint8_t* mask = args.mask + (kBits ? piece.mask : 0);
        apply_run<1>(piece.offset, 0, &mask, piece.length, means, scales, shifts, slopes, extras,
                     geometry.template ahead_again<S>(2, c, step, geometry.end_step(chunk), piece));
      }
    }
  }

  void apply_rows(int64_t g, int64_t chunk_begin, int64_t chunk_end) const {
    const Group group = geometry.group(g);
    Columns<T> mean, scale, shift, slope, extra;
    this->columns_of(group, mean, scale, shift);
    if (training) {
      geometry.spread(group, coefficients + group.first_channel, slope.at);
      geometry.spread(group, coefficients + args.shape.C + group.first_channel, extra.at);
      in_pair_order<S>(slope.at, group.width);
      in_pair_order<S>(extra.at, group.width);
    }
    const Column means(mean.at), scales(scale.at), shifts(shift.at), slopes(slope.at),
        extras(extra.at);
    const bool pairs = writes_rows_together(args.shape);
    const auto rows = [&](auto count, int64_t step) BATCHOPS_INLINE_LAMBDA {
      constexpr int R = decltype(count)::value;
      const auto row = geometry.row(g, group, step);
      FlatBits flat[kBits ? R : 1];
      const uint8_t* mask[R] = {};
      this->template masks_of<R>(g, group, step, mask, flat);
      apply_run<R>(row.offset, geometry.plan.row_stride, mask, row.width, means, scales, shifts,
                   slopes, extras, geometry.rereads() ? kAhead<S> : 0);
    };
    for (int64_t chunk = chunk_end; chunk-- > chunk_begin;) {
      const int64_t end = geometry.end_step(chunk);
      int64_t step = geometry.first_step(chunk);
      if (pairs) {
        const int64_t full_end = end - (geometry.plan.tail > 0 && end == geometry.plan.steps);
        for (; step + 2 <= full_end; step += 2) rows(std::integral_constant<int, 2>{}, step);
      }
      for (; step < end; ++step) rows(std::integral_constant<int, 1>{}, step);
    }
  }
};

template <class Pass>
inline const char* run_backward(const BatchNormBackward& args, const Geometry& geometry,
                                const Parallel& par,
                                const ChannelStats<const typename Pass::T>& stats, double* sums) {
  using T = typename Pass::T;
  constexpr int64_t kOnStack = 1024;
  const int64_t C = args.shape.C;
  T on_stack[kOnStack];
  std::unique_ptr<T[]> memory;
  if (2 * C > kOnStack) {
    memory.reset(new (std::nothrow) T[2 * C]);
    if (memory == nullptr) return "batch_norm: out of memory for the coefficients of dx";
  }
  Pass pass{{args, geometry, stats, sums, memory ? memory.get() : on_stack}};
  const bool apply = args.dx != nullptr || args.dresidual != nullptr;
  const bool reduce =
      args.dweight != nullptr || args.dbias != nullptr || (args.training && args.dx != nullptr);
  if (reduce) return reduce_and_apply(geometry, par, pass, apply);
  if (!apply) return nullptr;
  for (int64_t i = 0; i < 2 * C; ++i) pass.coefficients[i] = 0;
  return apply_only(geometry, par, pass);
}

// Identity has an instance for each mode, Relu one for training.
template <class S, class Act, Derivative kDerivative>
inline const char* backward_of(const BatchNormBackward& args, const Geometry& geometry,
                               const Parallel& par, const ChannelStats<const AccOf<S>>& stats,
                               double* sums) {
  const auto run = [&](auto mode) {
    using Pass = BackwardPass<S, Act, kDerivative, decltype(mode)::value>;
    return run_backward<Pass>(args, geometry, par, stats, sums);
  };
  if constexpr (std::is_same_v<Act, GenericActivation>) {
    return run(std::integral_constant<Mode, Mode::either>{});
  } else {
    if constexpr (std::is_same_v<Act, Identity>) {
      if (!args.training) return run(std::integral_constant<Mode, Mode::eval>{});
    }
    return run(std::integral_constant<Mode, Mode::training>{});
  }
}

template <class S, class Act>
inline const char* backward_of(const BatchNormBackward& args, const Geometry& geometry,
                               const Parallel& par, const ChannelStats<const AccOf<S>>& stats,
                               double* sums) {
  if constexpr (!Act::kNeedsZ) {
    return backward_of<S, Act, Derivative::one>(args, geometry, par, stats, sums);
  } else {
    if constexpr (Act::kMaskable) {
      if (args.mask != nullptr) {
        return backward_of<S, Act, Derivative::bits>(args, geometry, par, stats, sums);
      }
    }
    return backward_of<S, Act, Derivative::recomputed>(args, geometry, par, stats, sums);
  }
}

// The samples of `part` share statistics: ghost batch k of `whole`.
inline const char* backward_ghost(const BatchNormBackward& part, const BatchNormBackward& whole,
                                  int64_t k, const Parallel& par, double* sums) {
  const Geometry geometry(part.shape);
  const Parallel& runner = part.shape.numel() < kForkElements ? Parallel{} : par;
  const char* error = nullptr;
  with_element(part.shape.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ChannelStats<const AccOf<S>> stats(whole.stats, whole.shape, k);
    const auto generic = [&] {
      return backward_of<S, GenericActivation>(part, geometry, runner, stats, sums);
    };
    // Only that instance looks for a residual when it recomputes z, or has Relu in eval mode.
    const bool adds = part.mask == nullptr && residual_of<S>(part) != nullptr;
    if (adds || (!part.training && part.shape.activation != Activation::none)) {
      error = generic();
      return;
    }
    with_instance<S, Identity, Relu>(part.shape, [&](auto act) {
      error = backward_of<S, decltype(act)>(part, geometry, runner, stats, sums);
    });
  });
  return error;
}

inline const char* backward_ghosts(const BatchNormBackward& args, const Parallel& par) {
  const BatchNormShape& shape = args.shape;
  const int64_t ghosts = shape.ghosts(), C = shape.C;
  const bool params = args.dweight != nullptr || args.dbias != nullptr;
  // [ghost][dweight, dbias][channel]
  std::unique_ptr<double[]> sums(params ? new (std::nothrow) double[ghosts * 2 * C] : nullptr);
  if (params && sums == nullptr) return "batch_norm: out of memory for the ghost batches";
  const char* error = for_each_ghost(
      args, par, [&](const BatchNormBackward& part, int64_t k, const Parallel& runner) {
        return backward_ghost(part, args, k, runner, params ? sums.get() + k * 2 * C : nullptr);
      });
  if (error != nullptr || !params) return error;
  for_each_channel_block(C, ghosts, par, [&](int64_t first, int64_t count) {
    double* const dweight = sums.get() + first;
    double* const dbias = dweight + C;
    for (int64_t k = 1; k < ghosts; ++k) {
      const double* const other = dweight + k * 2 * C;
      for (int64_t i = 0; i < count; ++i) {
        dweight[i] += other[i];
        dbias[i] += other[C + i];
      }
    }
    write_channels(args.dweight, shape.param_dtype, first, count, dweight);
    write_channels(args.dbias, shape.param_dtype, first, count, dbias);
  });
  return nullptr;
}

const char* batch_norm_backward(const BatchNormBackward& args, const Parallel& par) {
  if (args.mask != nullptr && !traits_of(args.shape.activation).maskable) {
    return "batch_norm: expected no mask with an activation whose derivative needs more than a bit";
  }
  return args.shape.ghosts() > 1 ? backward_ghosts(args, par)
                                 : backward_ghost(args, args, 0, par, nullptr);
}
