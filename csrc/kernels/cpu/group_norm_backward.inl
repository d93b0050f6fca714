// Backward: Σ dz and Σ dz · (x - mean) of every channel of a sample, then dx and dresidual.
//
// With q_c = Σ dz · (x - mean) over the channel's values in one sample, the formula of group_norm.h
// regrouped, mean = hi + low:
//
//   dx = rstd · weight_c · dz + slope · (x - hi) + offset
//   slope = -rstd³ · Σ_c weight_c · q_c / M
//   offset = -rstd · Σ_c weight_c · Σ dz / M - slope · low
//   dweight_c = Σ_n rstd · q_c,   dbias_c = Σ_n Σ dz

// What dz = dy · activation'(z) is made from.
enum class Derivative { one, recomputed, bits };

// What is the same for all activations: sums of the derivatives, and dx from derivatives that were
// kept, or from dy where there is no activation (`kOne`).
template <class S, bool kOneDerivative>
struct GroupBackwardOfKept {
  using Element = S;
  using T = AccOf<S>;
  using V = Vec<T>;
  static constexpr int L = V::kLanes;
  static constexpr bool kOne = kOneDerivative;

  const GroupNormBackward& args;
  const GroupNormPlan& plan;
  const AffineValues<T>& affine;
  double* const partial;  // [block][dweight, dbias][C]
  const GroupNormShape& shape = args.shape;
  const RowGeometry rows{shape, plan};
  const T* const stats = static_cast<const T*>(args.stats);
  const S* const x = static_cast<const S*>(args.x);
  const S* const dy = static_cast<const S*>(args.dy);
  S* const dx = static_cast<S*>(args.dx);
  S* const dresidual = static_cast<S*>(args.dresidual);
  S* const output = dx != nullptr ? dx : dresidual;
  const bool past_cache = streams(args.shape);
  // Both outputs may go past the cache where both are aligned at once.
  const bool past_residual =
      past_cache && (reinterpret_cast<uintptr_t>(output) - reinterpret_cast<uintptr_t>(dresidual)) %
                            (L * sizeof(S)) ==
                        0;

  GroupStats<T> stats_of(int64_t index) const { return {stats, shape.N * shape.G, index}; }

  // What a loop over elements needs, to be kept in registers: as far as the compiler knows, a store
  // to dx may alter any member of what lies in memory.
  struct Elements {
    const S* x;
    const S* dy;
    S* dx;
    S* dresidual;
    bool past_residual;

    template <class Lanes, class Taken, class Value>
    BATCHOPS_INLINE void write(int64_t at, Lanes lanes, bool past, Taken dz, Taken centred,
                               Value scale, Value slope, Value offset) const {
      if (dx != nullptr) put(dx + at, fma(scale, dz, fma(slope, centred, offset)), lanes, past);
      if (dresidual != nullptr) put(dresidual + at, dz, lanes, past && past_residual);
    }
  };
  Elements elements() const { return {x, dy, dx, dresidual, past_residual}; }

  struct Coefficients {
    T slope, offset;
  };
  // Nothing summed yet in sample n's block for channels [first, end), if n is its first sample.
  void begin_block(int64_t n, int64_t first, int64_t end) const {
    if (n % plan.block_samples != 0) return;
    double* const dweight = partial + n / plan.block_samples * 2 * shape.C;
    double* const dbias = dweight + shape.C;
    for (int64_t c = first; c < end; ++c) dweight[c] = dbias[c] = 0;
  }
  // From the sums of the group's channels, which are added to the block's dweight and dbias.
  Coefficients finish(int64_t index, const double* dz, const double* dz_x) const {
    const int64_t n = index / shape.G, c0 = index % shape.G * plan.D;
    const GroupStats<T> of = stats_of(index);
    double* const dweight = partial + n / plan.block_samples * 2 * shape.C + c0;
    double* const dbias = dweight + shape.C;
    const double low = of.low, rstd = of.rstd, inverse = 1.0 / static_cast<double>(plan.M);
    const int64_t columns = plan.kind == GroupNormPlan::rows ? shape.HxW : 1;
    double a = 0, b = 0;
    for (int64_t d = 0; d < plan.D; ++d) {
      const double weight = affine.weight[(c0 + d) * columns], q = dz_x[d] - low * dz[d];
      a += weight * dz[d];
      b += weight * q;
      dweight[d] += q * rstd;
      dbias[d] += dz[d];
    }
    return coefficients(of, a, b, inverse);
  }
  // a = Σ weight · dz, b = Σ weight · dz · (x - mean)
  static Coefficients coefficients(const GroupStats<T>& of, double a, double b, double inverse) {
    const double low = of.low, rstd = of.rstd, slope = -rstd * rstd * rstd * b * inverse;
    return {static_cast<T>(slope), static_cast<T>(-rstd * a * inverse - slope * low)};
  }

  // slope and offset of sample n's groups, to the columns.
  void finish_pixels(int64_t n, const double* dz, const double* dz_x, T* of_groups) const {
    const int64_t G = shape.G;
    for (int64_t g = 0; g < G; ++g) {
      const Coefficients with = finish(n * G + g, dz + g * plan.D, dz_x + g * plan.D);
      of_groups[g] = with.slope;
      of_groups[G + g] = with.offset;
    }
  }

  // ------------------------------------------------------------------- planes

  struct Values {
    V first, second;
  };

  void apply_planes(int64_t unit, int64_t chunk, const T* kept, Coefficients with) const {
    const int64_t HxW = shape.HxW, base = unit * plan.M;
    const int64_t begin = begin_of_chunk(plan, HxW, chunk);
    const int64_t end = begin_of_chunk(plan, HxW, chunk + 1);
    const GroupStats<T> of = stats_of(unit);
    const T* const weight = affine.weight + unit % shape.G * plan.D;
    const V mean(of.hi), slope(with.slope), offset(with.offset);
    const Elements elements = this->elements();
    const bool past = past_cache;
    const int64_t M = plan.M;
    const bool asks = asks_for_next_group(plan);
    for_planes_in_order<T>(
        begin, end, HxW, output + base,
        [&](int64_t d) BATCHOPS_INLINE_LAMBDA {
          const V scale(of.scale(weight[d]));
          return Values{scale, scale};
        },
        [&](int64_t j, auto lanes, V scale, V) BATCHOPS_INLINE_LAMBDA {
          if (kOne && asks) {  // derivatives would take the room
            prefetch_pair<T>(elements.x, base + M + j);
            prefetch_pair<T>(elements.dy, base + M + j);
          }
          const auto centred = load<T>(elements.x + base + j, lanes) - mean;
          const auto write = [&](auto dz) BATCHOPS_INLINE_LAMBDA {
            elements.write(base + j, lanes, past, dz, centred, scale, slope, offset);
          };
          if constexpr (kOne) {
            write(load<T>(elements.dy + base + j, lanes));
          } else {
            write(pair_order<S>(load_whole(kept + (j - begin), lanes)));
          }
        });
  }

  // --------------------------------------------------------------------- rows

  // So many rows go through a group together that the columns' weights are loaded, and their sums
  // loaded and stored, less often. They must stay in the second-level cache until dx is written;
  // from memory, rows come fastest one after the other.
  static constexpr int kRows = 4;
  bool takes_rows_together() const {
    constexpr int64_t kCacheBytes = 512 << 10;
    const int64_t bytes = kRows * 2 * plan.width * static_cast<int64_t>(sizeof(S));
    return !past_cache && bytes <= kCacheBytes;
  }

  // Group g of R samples from n on: sums of the columns to dz and dz_xhat, and dx. `kept` holds dz
  // of R whole rows, `stride` apart, where there is an activation. dz and dz_xhat are in pair order
  // as far as there are whole pairs: the rest of one lies beside the next group's sums.
  template <int R>
  void group_of_rows(int64_t n, int64_t g, const T* kept, int64_t stride, T* dz, T* dz_xhat) const {
    constexpr int kChains = R == 1 ? 2 : 1;
    const int64_t first = g * plan.M, at = rows.row_offset(n, 0) + first, width = plan.width;
    const T* const weight = affine.weight + first;
    const Pair<T> zero(V(T(0)));
    const Elements elements = this->elements();
    const auto ordered = [](const T* p, auto lanes)
                             BATCHOPS_INLINE_LAMBDA { return pair_order<S>(load<T>(p, lanes)); };
    const auto gradient = [&](int k, int64_t j, auto lanes) BATCHOPS_INLINE_LAMBDA {
      if constexpr (kOne) {
        return load<T>(elements.dy + at + k * width + j, lanes);
      } else {
        return ordered(kept + k * stride + first + j, lanes);
      }
    };
    double a[R] = {}, b[R] = {};
    {
      V mean[R], rstd[R], minus_low[R];
      for (int k = 0; k < R; ++k) {
        const GroupStats<T> of = stats_of((n + k) * shape.G + g);
        mean[k] = V(of.hi);
        rstd[k] = V(of.rstd);
        minus_low[k] = V(-of.low * of.rstd);
      }
      for (int64_t from = 0; from < plan.M; from += kPieceElements) {
        const int64_t count = plan.M - from < kPieceElements ? plan.M - from : kPieceElements;
        Pair<T> s[R][kChains], q[R][kChains];
        for (int k = 0; k < R; ++k) {
          for (int u = 0; u < kChains; ++u) s[k][u] = q[k][u] = zero;
        }
        for_pairs<T, kChains>(0, count, [&](int64_t i, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
          constexpr bool kWhole = std::is_same_v<decltype(lanes), Two>;
          const int64_t j = from + i;
          const Pair<T> weight_j = ordered(weight + j, lanes);
          Pair<T> sum_j = load<T>(dz + j, lanes), product_j = load<T>(dz_xhat + j, lanes);
          if constexpr (!kWhole) {
            sum_j = pair_order<S>(sum_j);
            product_j = pair_order<S>(product_j);
          }
          for (int k = 0; k < R; ++k) {
            const Pair<T> d = gradient(k, j, lanes), weighted = d * weight_j;
            const Pair<T> centred = load<T>(elements.x + at + k * width + j, lanes) - mean[k];
            s[k][u] = s[k][u] + weighted;
            q[k][u] = fma(weighted, centred, q[k][u]);
            sum_j = sum_j + d;
            product_j = fma(d, fma(centred, rstd[k], minus_low[k]), product_j);
          }
          if constexpr (!kWhole) {
            sum_j = element_order<S>(sum_j);
            product_j = element_order<S>(product_j);
          }
          put(dz + j, sum_j, lanes, false);
          put(dz_xhat + j, product_j, lanes, false);
        });
        for (int k = 0; k < R; ++k) {
          for (int u = 1; u < kChains; ++u) {
            s[k][0] = s[k][0] + s[k][u];
            q[k][0] = q[k][0] + q[k][u];
          }
          a[k] += sum(s[k][0]);
          b[k] += sum(q[k][0]);
        }
      }
    }
    if (output == nullptr) return;
    const bool past = past_cache;
    for (int k = 0; k < R; ++k) {
      const GroupStats<T> of = stats_of((n + k) * shape.G + g);
      const double inverse = 1.0 / static_cast<double>(plan.M);
      const Coefficients with = coefficients(of, a[k], b[k] - of.low * a[k], inverse);
      const V mean(of.hi), rstd(of.rstd);
      const Pair<T> slope(V(with.slope)), offset(V(with.offset));
      const int64_t row = at + k * width;
      const auto vector = [&](int64_t j, auto lanes, int) BATCHOPS_INLINE_LAMBDA {
        // The memory would idle while this loop runs in the cache.
        prefetch_pair<T>(elements.x, row + R * width + j);
        prefetch_pair<T>(elements.dy, row + R * width + j);
        elements.write(row + j, lanes, past, gradient(k, j, lanes),
                       load<T>(elements.x + row + j, lanes) - mean,
                       rstd * ordered(weight + j, lanes), slope, offset);
      };
      int64_t start = 0;
      if (past) {
        const int64_t head = to_boundary<T>(output + row);
        start = head < plan.M ? head : plan.M;
        if (start > 0) vector(0, Rest{start}, 0);
      }
      for_pairs<T>(start, plan.M, vector);
    }
  }
  // The columns' sums in the elements' order.
  void order_sums(T* columns) const {
    for (int64_t g = 0; g < shape.G; ++g) {
      in_element_order<S>(columns + g * plan.M, plan.M - plan.M % (2 * L));
    }
  }
};

template <class S, class Act, Derivative kDerivative>
struct GroupBackward : GroupBackwardOfKept<S, kDerivative == Derivative::one> {
  using Base = GroupBackwardOfKept<S, kDerivative == Derivative::one>;
  using Base::args, Base::plan, Base::affine, Base::shape, Base::rows, Base::stats, Base::stats_of;
  using Base::L, Base::kOne, Base::output, Base::past_cache;
  using typename Base::T, typename Base::V;
  static constexpr bool kBits = kDerivative == Derivative::bits;

  const Act act;

  // What one access takes: a pair, or the vector that a stretch of mask bits stands for.
  using X = std::conditional_t<kBits, V, Pair<T>>;

  struct Elements : Base::Elements {
    const S* residual;
    Act act;

    template <class Lanes, class Mean, class Scale>
    BATCHOPS_INLINE X derivative(int64_t at, Lanes lanes, uint64_t bits, X value, Mean mean,
                                 Scale scale, Scale shift) const {
      const X gradient = load<T>(this->dy + at, lanes);
      if constexpr (kOne) {
        return gradient;
      } else if constexpr (kBits) {
        return act.backward_bits(gradient, bits);
      } else {
        X z = normalize(value, X(mean), X(scale), X(shift));
        if (residual != nullptr) z = z + load<T>(residual + at, lanes);
        return derivative_of(act, gradient, z);
      }
    }
  };
  Elements elements() const { return {Base::elements(), residual_of<S>(args), act}; }

  // Calls vector(j, lanes, u, bits) over [from, n); `mask` is where the bits of j = 0 lie.
  static constexpr int kChains = kBits ? 4 : 2;
  template <int kUnroll, class Vector>
  static BATCHOPS_INLINE void for_run(int64_t from, int64_t n, const uint8_t* mask,
                                      Vector&& vector) {
    if constexpr (kBits) {
      uint64_t bits = 0;
      for_blocks<T>(
          from, n,
          [&](int64_t j, auto bytes)
              BATCHOPS_INLINE_LAMBDA { bits = read_bits(mask + j / 8, bytes); },
          [&](int64_t j, auto lanes, int u)
              BATCHOPS_INLINE_LAMBDA { vector(j, lanes, u, bits >> (u * L)); },
          [](int64_t, auto) {});
    } else {
      for_pairs<T, kUnroll>(from, n, [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
        vector(j, lanes, u, uint64_t{0});
      });
    }
  }
  // In the order that for_run() takes values in, from the elements' order, and back.
  static void in_run_order(T* values, int64_t width) {
    if constexpr (!kBits) in_pair_order<S>(values, width);
  }
  static void from_run_order(T* values, int64_t width) {
    if constexpr (!kBits) in_element_order<S>(values, width);
  }

  // ------------------------------------------------------------------- planes

  // Sums of chunk `chunk` of group `unit` for its D channels, added to dz and dz_x; the derivatives
  // themselves go to `kept` (not where there is no activation), whole pairs at a time.
  void sum_planes(int64_t unit, int64_t chunk, T* kept, double* dz, double* dz_x) const {
    const int64_t HxW = shape.HxW, base = unit * plan.M;
    const int64_t begin = begin_of_chunk(plan, HxW, chunk);
    const int64_t end = begin_of_chunk(plan, HxW, chunk + 1);
    const int64_t first_channel = unit % shape.G * plan.D;
    const GroupStats<T> of = stats_of(unit);
    const V mean(of.hi), zero(T(0));
    const Elements elements = this->elements();
    int64_t d = begin / HxW, i = begin % HxW;
    for (int64_t j0 = begin; j0 < end; ++d, i = 0) {
      const int64_t n = end - j0 < HxW - i ? end - j0 : HxW - i;
      const T scale_d = of.scale(affine.weight[first_channel + d]);
      const V scale(scale_d), shift(of.shift(scale_d, affine.bias[first_channel + d]));
      const uint8_t* mask =
          kBits ? args.mask + (base + j0) / HxW * ((HxW + 7) / 8) + i / 8 : nullptr;
      double total = 0, total_x = 0;
      for (int64_t from = 0; from < n; from += kPieceElements) {
        const int64_t count = n - from < kPieceElements ? n - from : kPieceElements;
        const int64_t at = base + j0 + from;
        T* const to = kOne ? nullptr : kept + (j0 - begin + from);
        X s[kChains], q[kChains];
        for (int u = 0; u < kChains; ++u) s[u] = q[u] = zero;
        for_run<2>(0, count, kBits ? mask + from / 8 : nullptr,
                   [&](int64_t j, auto lanes, int u, uint64_t bits) BATCHOPS_INLINE_LAMBDA {
                     const X value = load<T>(elements.x + at + j, lanes);
                     const X g =
                         elements.derivative(at + j, lanes, bits, value, mean, scale, shift);
                     if constexpr (!kOne) store_whole(to + j, element_order<S>(g));
                     s[u] = s[u] + g;
                     q[u] = fma(g, value - mean, q[u]);
                   });
        for (int u = 1; u < kChains; ++u) {
          s[0] = s[0] + s[u];
          q[0] = q[0] + q[u];
        }
        total += sum(s[0]);
        total_x += sum(q[0]);
      }
      dz[d] += total;
      dz_x[d] += total_x;
      j0 += n;
    }
  }

  // --------------------------------------------------------------------- rows

  // dz of a whole row, into `to`.
  template <class Affine>
  void derive_row(int64_t n, const Affine of, T* to, uint8_t* flat) const {
    const Elements elements = this->elements();
    const int64_t at = rows.row_offset(n, 0);
    for_run<1>(0, plan.width, mask_of(n, 0, flat),
               [&](int64_t j, auto lanes, int, uint64_t bits) BATCHOPS_INLINE_LAMBDA {
                 const X value = load<T>(elements.x + at + j, lanes);
                 const X g = elements.derivative(at + j, lanes, bits, value, of.mean(j, lanes),
                                                 of.scale(j, lanes), of.shift(j, lanes));
                 store_whole(to + j, element_order<S>(g));
               });
  }
  // The bits of a row in one string.
  const uint8_t* mask_of(int64_t n, int64_t step, uint8_t* flat) const {
    if constexpr (!kBits) return nullptr;
    const uint8_t* mask = args.mask + rows.mask_offset(n, step);
    const int64_t width = rows.row_width(step);
    if (!rows.joined(width)) return mask;
    join_runs(flat, mask, rows.runs(width), rows.run());
    return flat;
  }

  // ------------------------------------------------------------------- pixels

  // Rows of scratch: mean, scale, shift, slope, offset, and two for the sums.
  static constexpr int kColumnRows = 7;

  void sum_pixels(int64_t n, int64_t chunk, const ScratchRows<T>& columns, uint8_t* flat,
                  double* dz, double* dz_x) const {
    const int64_t C = shape.C, end = rows.end_step(chunk);
    const int64_t full_end = plan.tail > 0 && end == plan.steps ? end - 1 : end;
    const bool together = !kBits && (!streams(shape) || sums_wait(shape.dtype, 2, plan.width));
    T* const s = columns[5];
    T* const q = columns[6];
    for (int64_t c = 0; c < C; ++c) dz[c] = dz_x[c] = 0;
    for (int64_t step = rows.first_step(chunk); step < end;) {
      const int64_t stop = step >= full_end                  ? end
                           : full_end - step > kRowsPerFlush ? step + kRowsPerFlush
                                                             : full_end;
      for (int64_t j = 0; j < padded(plan.width); j += L) {
        store(s + j, V(T(0)));
        store(q + j, V(T(0)));
      }
      const int64_t width = rows.row_width(step);
      for (; together && step + 2 <= stop; step += 2) add_rows<2>(n, step, columns, flat, s, q);
      for (; step < stop; ++step) add_rows<1>(n, step, columns, flat, s, q);
      from_run_order(s, width);
      from_run_order(q, width);
      rows.fold_channels(s, width, dz);
      rows.fold_channels(q, width, dz_x);
    }
  }
  template <int R>
  BATCHOPS_INLINE void add_rows(int64_t n, int64_t step, const ScratchRows<T>& columns,
                                uint8_t* flat, T* s, T* q) const {
    const int64_t at = rows.row_offset(n, step), stride = plan.width;
    const Elements elements = this->elements();
    const T* const means = columns[0];
    const T* const scales = columns[1];
    const T* const shifts = columns[2];
    for_run<1>(0, rows.row_width(step), mask_of(n, step, flat),
               [&](int64_t j, auto lanes, int, uint64_t bits) BATCHOPS_INLINE_LAMBDA {
                 const X mean = load_whole(means + j, lanes);
                 X scale = mean, shift = mean;
                 if constexpr (kDerivative == Derivative::recomputed) {
                   scale = load_whole(scales + j, lanes);
                   shift = load_whole(shifts + j, lanes);
                 }
                 X sum_j = load_whole(s + j, lanes), product_j = load_whole(q + j, lanes);
                 for (int k = 0; k < R; ++k) {
                   const int64_t from = at + k * stride + j;
                   if constexpr (R > 1) {  // the next R rows, in the order of memory
                     const int64_t next = at + R * (stride + j) + k * 2 * L;
                     prefetch(elements.x, next);
                     prefetch(elements.dy, next);
                   } else {
                     prefetch_ahead<T>(elements.x, from, lanes);
                     prefetch_ahead<T>(elements.dy, from, lanes);
                   }
                   const X value = load<T>(elements.x + from, lanes);
                   const X g = elements.derivative(from, lanes, bits, value, mean, scale, shift);
                   sum_j = sum_j + g;
                   product_j = fma(g, value - mean, product_j);
                 }
                 store_whole(s + j, sum_j);
                 store_whole(q + j, product_j);
               });
  }

  void set_columns(int64_t n, const ScratchRows<T>& columns) const {
    column_affine(rows, stats, n, affine, columns[0], columns[1], columns[2]);
    for (int row = 0; row < 3; ++row) in_run_order(columns[row], plan.width);
  }

  void apply_pixels(int64_t n, int64_t chunk, const ScratchRows<T>& columns, uint8_t* flat) const {
    const int64_t end = rows.end_step(chunk);
    const T* const means = columns[0];
    const T* const scales = columns[1];
    const T* const shifts = columns[2];
    const T* const slopes = columns[3];
    const T* const offsets = columns[4];
    const Elements elements = this->elements();
    for (int64_t step = rows.first_step(chunk); step < end; ++step) {
      const int64_t at = rows.row_offset(n, step), width = rows.row_width(step);
      bool past = past_cache;
      const auto vector = [&](int64_t j, auto lanes, int, uint64_t bits) BATCHOPS_INLINE_LAMBDA {
        prefetch_ahead<T>(elements.x, at + j, lanes);
        prefetch_ahead<T>(elements.dy, at + j, lanes);
        const X value = load<T>(elements.x + at + j, lanes);
        const X mean = load_whole(means + j, lanes);
        const X scale = load_whole(scales + j, lanes);
        X shift = mean;
        if constexpr (kDerivative == Derivative::recomputed) shift = load_whole(shifts + j, lanes);
        const X g = elements.derivative(at + j, lanes, bits, value, mean, scale, shift);
        elements.write(at + j, lanes, past, g, value - mean, scale, load_whole(slopes + j, lanes),
                       load_whole(offsets + j, lanes));
      };
      int64_t start = 0;
      if (past && !can_stream<T>(output + at)) {
        if constexpr (kBits || kSwapped<S>) {
          past = false;  // mask bytes and pairs begin at the row's first element
        } else {
          const int64_t head = to_boundary<T>(output + at);
          start = head < width ? head : width;
          vector(0, Rest{start}, 0, 0);
        }
      }
      for_run<1>(start, width, mask_of(n, step, flat), vector);
    }
  }
};

// Calls f(n, first g, end g) over tasks [begin, end) of blocks × groups, the samples of a block in
// order.
template <class F>
inline void for_block_groups(const GroupNormPlan& plan, const GroupNormShape& shape, int64_t begin,
                             int64_t end, F&& f) {
  while (begin < end) {
    const int64_t block = begin / shape.G, g = begin % shape.G;
    const int64_t g_end = end - begin < shape.G - g ? g + (end - begin) : shape.G;
    const int64_t first = block * plan.block_samples, stop = first + plan.block_samples;
    for (int64_t n = first; n < stop && n < shape.N; ++n) f(n, g, g_end);
    begin += g_end - g;
  }
}

template <class Pass>
inline const char* backward_planes(const Pass& pass, const Parallel& par) {
  using T = typename Pass::T;
  const GroupNormPlan& plan = pass.plan;
  const GroupNormShape& shape = pass.shape;
  // What fits a core's second-level cache keeps its derivatives there for the second pass.
  constexpr int64_t kKeptChunks = 2;
  const bool keep = plan.chunks <= kKeptChunks;
  const int64_t room = Pass::kOne ? 0 : keep ? plan.M : plan.chunk_elements + 64;
  std::atomic<bool> failed{false};
  const auto with_scratch = [&](int64_t sums, auto&& f) {
    Scratch<T> kept;
    Scratch<double> doubles;
    if (!kept.allocate(room) || !doubles.allocate(sums)) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    f(kept.get(), doubles.get());
  };
  const auto apply = [&](int64_t unit, int64_t chunk, T* kept, typename Pass::Coefficients with,
                         double* unused) {
    if (Pass::kOne || keep) {
      const int64_t at = begin_of_chunk(plan, shape.HxW, chunk);
      pass.apply_planes(unit, chunk, Pass::kOne ? nullptr : kept + at, with);
      return;
    }
    pass.sum_planes(unit, chunk, kept, unused, unused + plan.D);
    pass.apply_planes(unit, chunk, kept, with);
  };
  if (takes_whole_units(plan, par)) {
    par(plan.blocks * shape.G, [&](int64_t begin, int64_t end) {
      with_scratch(4 * plan.D, [&](T* kept, double* sums) {
        double* const unused = sums + 2 * plan.D;
        for (int64_t i = 0; i < 4 * plan.D; ++i) sums[i] = 0;
        for_block_groups(plan, shape, begin, end, [&](int64_t n, int64_t g, int64_t g_end) {
          pass.begin_block(n, g * plan.D, g_end * plan.D);
          for (; g < g_end; ++g) {
            const int64_t unit = n * shape.G + g;
            for (int64_t i = 0; i < 2 * plan.D; ++i) sums[i] = 0;
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
              const int64_t at = keep ? begin_of_chunk(plan, shape.HxW, chunk) : 0;
              pass.sum_planes(unit, chunk, Pass::kOne ? nullptr : kept + at, sums, sums + plan.D);
            }
            const auto with = pass.finish(unit, sums, sums + plan.D);
            if (pass.output == nullptr) continue;
            for (int64_t chunk = plan.chunks; chunk-- > 0;) {
              apply(unit, chunk, kept, with, unused);
            }
          }
        });
        fence();
      });
    });
    return failed ? kOutOfMemory : nullptr;
  }
  // [unit][chunk][2][D], then slope and offset of each unit.
  Scratch<double> partial;
  const std::unique_ptr<typename Pass::Coefficients[]> of_unit(
      new (std::nothrow) typename Pass::Coefficients[plan.units]);
  const int64_t tasks = plan.units * plan.chunks, stride = 2 * plan.D;
  if (!partial.allocate(tasks * stride) || of_unit == nullptr) return kOutOfMemory;
  double* const at = partial.get();
  par(tasks, [&](int64_t begin, int64_t end) {
    with_scratch(0, [&](T* kept, double*) {
      for (int64_t i = begin; i < end; ++i) {
        double* to = at + i * stride;
        for (int64_t d = 0; d < stride; ++d) to[d] = 0;
        pass.sum_planes(i / plan.chunks, i % plan.chunks, kept, to, to + plan.D);
      }
    });
  });
  if (failed) return kOutOfMemory;
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    if (unit % shape.G == 0) pass.begin_block(unit / shape.G, 0, shape.C);
    double* total = at + unit * plan.chunks * stride;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      for (int64_t d = 0; d < stride; ++d) total[d] += total[chunk * stride + d];
    }
    of_unit[unit] = pass.finish(unit, total, total + plan.D);
  }
  if (pass.output == nullptr) return nullptr;
  par(tasks, [&](int64_t begin, int64_t end) {
    with_scratch(2 * plan.D, [&](T* kept, double* unused) {
      for (int64_t i = 0; i < 2 * plan.D; ++i) unused[i] = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / plan.chunks, chunk = i % plan.chunks;
        if constexpr (!Pass::kOne) pass.sum_planes(unit, chunk, kept, unused, unused + plan.D);
        pass.apply_planes(unit, chunk, kept, of_unit[unit]);
      }
      fence();
    });
  });
  return failed ? kOutOfMemory : nullptr;
}

template <class Pass>
inline const char* backward_rows(const Pass& pass, const Parallel& par) {
  using S = typename Pass::Element;
  using T = typename Pass::T;
  const GroupNormPlan& plan = pass.plan;
  const GroupNormShape& shape = pass.shape;
  std::atomic<bool> failed{false};
  par(plan.blocks, [&](int64_t begin, int64_t end) {
    // dz and dz · x̂ of the columns, dz of a few rows; mean, scale and shift of the columns
    ScratchRows<T> columns, spread;
    Scratch<uint8_t> flat;
    const bool spreads = !Pass::kOne && shape.G > 1;
    if (!columns.allocate(2 + (Pass::kOne ? 0 : Pass::kRows), plan.width) ||
        (spreads && !spread.allocate(3, plan.width)) ||
        (Pass::kBits && !flat.allocate(plan.width / 8 + 16))) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    const auto derive = [&](int64_t n, T* to) {
      if (spreads) {
        pass.set_columns(n, spread);
        pass.derive_row(n, ColumnAffine<S>{spread[0], spread[1], spread[2]}, to, flat.get());
      } else {
        const RowAffine<S> of(pass.stats_of(n), pass.affine.weight, pass.affine.bias);
        pass.derive_row(n, of, to, flat.get());
      }
    };
    const auto take_rows = [&](auto count, int64_t n) {
      constexpr int R = decltype(count)::value;
      T* const kept = Pass::kOne ? nullptr : columns[2];
      for (int k = 0; k < R && !Pass::kOne; ++k) derive(n + k, columns[2 + k]);
      for (int64_t g = 0; g < shape.G; ++g) {
        pass.template group_of_rows<R>(n, g, kept, columns.stride, columns[0] + g * plan.M,
                                       columns[1] + g * plan.M);
      }
    };
    const bool together = pass.takes_rows_together();
    for (int64_t block = begin; block < end; ++block) {
      double* const dweight = pass.partial + block * 2 * shape.C;
      const int64_t first = block * plan.block_samples;
      pass.begin_block(first, 0, shape.C);
      const int64_t stop =
          first + plan.block_samples < shape.N ? first + plan.block_samples : shape.N;
      for (int64_t n = first; n < stop;) {
        for (int row = 0; row < 2; ++row) {
          for (int64_t j = 0; j < plan.width; ++j) columns[row][j] = T(0);
        }
        const int64_t flush = stop - n < kRowsPerFlush ? stop : n + kRowsPerFlush;
        constexpr int R = Pass::kRows;
        for (; together && n + R <= flush; n += R) take_rows(std::integral_constant<int, R>{}, n);
        for (; n < flush; ++n) take_rows(std::integral_constant<int, 1>{}, n);
        for (int row = 0; row < 2; ++row) pass.order_sums(columns[row]);
        pass.rows.fold_channels(columns[1], plan.width, dweight);
        pass.rows.fold_channels(columns[0], plan.width, dweight + shape.C);
      }
    }
    fence();
  });
  return failed ? kOutOfMemory : nullptr;
}

template <class Pass>
inline const char* backward_pixels(const Pass& pass, const Parallel& par) {
  using T = typename Pass::T;
  const GroupNormPlan& plan = pass.plan;
  const GroupNormShape& shape = pass.shape;
  const int64_t C = shape.C, G = shape.G;
  std::atomic<bool> failed{false};
  const auto with_scratch = [&](auto&& f) {
    ScratchRows<T> columns;
    Scratch<uint8_t> flat;
    Scratch<double> sums;
    Scratch<T> groups;
    if (!columns.allocate(Pass::kColumnRows, plan.width) || !sums.allocate(4 * C) ||
        !groups.allocate(2 * G) || (Pass::kBits && !flat.allocate(plan.width / 8 + 16))) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    f(columns, flat.get(), sums.get(), groups.get());
  };
  const auto spread = [&](const T* groups, const ScratchRows<T>& columns) {
    pass.rows.spread_groups(groups, columns[3]);
    pass.rows.spread_groups(groups + G, columns[4]);
    for (int row = 3; row < 5; ++row) pass.in_run_order(columns[row], plan.width);
  };
  if (takes_whole_units(plan, par)) {
    par(plan.blocks, [&](int64_t begin, int64_t end) {
      with_scratch([&](const ScratchRows<T>& columns, uint8_t* flat, double* sums, T* groups) {
        double* const part = sums + 2 * C;
        const int64_t stop =
            end * plan.block_samples < shape.N ? end * plan.block_samples : shape.N;
        for (int64_t n = begin * plan.block_samples; n < stop; ++n) {
          pass.begin_block(n, 0, C);
          pass.set_columns(n, columns);
          pass.sum_pixels(n, 0, columns, flat, sums, sums + C);
          for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
            pass.sum_pixels(n, chunk, columns, flat, part, part + C);
            for (int64_t i = 0; i < 2 * C; ++i) sums[i] += part[i];
          }
          pass.finish_pixels(n, sums, sums + C, groups);
          if (pass.output == nullptr) continue;
          spread(groups, columns);
          // The chunks from the last on: it is the one still in the cache.
          for (int64_t chunk = plan.chunks; chunk-- > 0;) {
            pass.apply_pixels(n, chunk, columns, flat);
          }
        }
        fence();
      });
    });
    return failed ? kOutOfMemory : nullptr;
  }
  // [n][chunk][2][C], then slope and offset [n][2][G].
  Scratch<double> partial;
  Scratch<T> of_groups;
  const int64_t tasks = shape.N * plan.chunks;
  if (!partial.allocate(tasks * 2 * C) || !of_groups.allocate(shape.N * 2 * G)) return kOutOfMemory;
  double* const at = partial.get();
  par(tasks, [&](int64_t begin, int64_t end) {
    with_scratch([&](const ScratchRows<T>& columns, uint8_t* flat, double*, T*) {
      for (int64_t i = begin, of = -1; i < end; ++i) {
        const int64_t n = i / plan.chunks;
        if (n != of) pass.set_columns(n, columns);
        of = n;
        pass.sum_pixels(n, i % plan.chunks, columns, flat, at + i * 2 * C, at + i * 2 * C + C);
      }
    });
  });
  if (failed) return kOutOfMemory;
  for (int64_t n = 0; n < shape.N; ++n) {
    pass.begin_block(n, 0, C);
    double* total = at + n * plan.chunks * 2 * C;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      for (int64_t i = 0; i < 2 * C; ++i) total[i] += total[chunk * 2 * C + i];
    }
    pass.finish_pixels(n, total, total + C, of_groups.get() + n * 2 * G);
  }
  if (pass.output == nullptr) return nullptr;
  par(tasks, [&](int64_t begin, int64_t end) {
    with_scratch([&](const ScratchRows<T>& columns, uint8_t* flat, double*, T*) {
      for (int64_t i = begin, of = -1; i < end; ++i) {
        const int64_t n = i / plan.chunks;
        if (n != of) {
          pass.set_columns(n, columns);
          spread(of_groups.get() + n * 2 * G, columns);
        }
        of = n;
        pass.apply_pixels(n, i % plan.chunks, columns, flat);
      }
      fence();
    });
  });
  return failed ? kOutOfMemory : nullptr;
}

// dweight and dbias from the sums of the blocks, in order.
inline void merge_blocks(const GroupNormBackward& args, const GroupNormPlan& plan, double* partial,
                         const Parallel& par) {
  const int64_t C = args.shape.C;
  constexpr int64_t kPart = 128;
  par((C + kPart - 1) / kPart, [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * kPart, c1 = end * kPart < C ? end * kPart : C;
    for (int64_t block = 1; block < plan.blocks; ++block) {
      const double* from = partial + block * 2 * C;
      for (int64_t c = c0; c < c1; ++c) partial[c] += from[c];
      for (int64_t c = c0; c < c1; ++c) partial[C + c] += from[C + c];
    }
    write_channels(args.dweight, args.shape.param_dtype, c0, c1 - c0, partial + c0);
    write_channels(args.dbias, args.shape.param_dtype, c0, c1 - c0, partial + C + c0);
  });
}

const char* group_norm_backward(const GroupNormBackward& args, const Parallel& par) {
  const GroupNormShape& shape = args.shape;
  const GroupNormPlan plan = plan_group_norm(shape);
  const Parallel serial;
  const Parallel& runner = shape.numel() < kForkElements ? serial : par;
  const char* error = nullptr;
  Scratch<double> partial;
  if (!partial.allocate(plan.blocks * 2 * shape.C)) return kOutOfMemory;
  with_element(shape.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    AffineValues<AccOf<S>> affine;
    if (!affine.read(args, plan)) {
      error = kOutOfMemory;
      return;
    }
    const auto run = [&](const auto& pass) {
      return plan.kind == GroupNormPlan::planes ? backward_planes(pass, runner)
             : plan.kind == GroupNormPlan::rows ? backward_rows(pass, runner)
                                                : backward_pixels(pass, runner);
    };
    if (args.mask != nullptr) {
      using Act = GenericActivation;
      error = run(GroupBackward<S, Act, Derivative::bits>{{args, plan, affine, partial.get()},
                                                          activation_of<Act>(shape)});
      return;
    }
    error = with_instance<S, Identity, FastSilu<sizeof(S) == 2>>(shape, [&](const auto& act) {
      using Act = std::remove_cvref_t<decltype(act)>;
      constexpr auto kDerivative = Act::kNeedsZ ? Derivative::recomputed : Derivative::one;
      return run(GroupBackward<S, Act, kDerivative>{{args, plan, affine, partial.get()}, act});
    });
  });
  if (error != nullptr) return error;
  if (args.dweight == nullptr && args.dbias == nullptr) return nullptr;
  merge_blocks(args, plan, partial.get(), plan.blocks * shape.C < kForkElements ? serial : par);
  return nullptr;
}
