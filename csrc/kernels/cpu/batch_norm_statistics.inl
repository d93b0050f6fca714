// The statistics of a batch, about a running shift.
//
// A sum of squares about a shift K loses nothing as long as K lies near the mean. So K starts as
// the mean of a chunk's first values and becomes the mean so far whenever the sums (float, over a
// few thousand values) are handed on to a mean and M2 in double (merge_moments).

// running += momentum · (batch - running), of M values with (mean, M2).
inline void update_running(const BatchNormForward& args, int64_t first, int64_t count, double M,
                           const double* mean, const double* m2) {
  const auto update = [&](void* running, const double* batch, double factor) {
    if (running == nullptr) return;
    with_dtype(args.shape.running_dtype, [&](auto* type) {
      auto* r = static_cast<std::remove_pointer_t<decltype(type)>*>(running) + first;
      for (int64_t i = 0; i < count; ++i) {
        const double old = to_float(r[i]);
        put(r + i, old + args.momentum * (batch[i] * factor - old));
      }
    });
  };
  update(args.running_mean, mean, 1.0);
  update(args.running_var, m2, 1.0 / (M > 1 ? M - 1 : 1));
}

template <class S>
struct Statistics {
  using T = AccOf<S>;
  using V = Vec<T>;
  using P = Pair<T>;
  static constexpr int L = V::kLanes;

  const BatchNormForward& args;
  const Geometry& geometry;
  const ChannelStats<T> stats;
  double* const moments;  // mean [C], M2 [C] of a ghost batch; null: the running statistics move
  const S* const x = static_cast<const S*>(args.x);

  void merge(int64_t chunk, int64_t count, double* mean, double* m2, const double* chunk_mean,
             const double* chunk_m2) const {
    const double n = geometry.values_before(geometry.first_step(chunk));
    const double m = geometry.values_before(geometry.end_step(chunk)) - n;
    for (int64_t i = 0; i < count; ++i) {
      merge_moments(n, m, mean[i], m2[i], chunk_mean[i], chunk_m2[i]);
    }
  }

  void reduce(int64_t g, int64_t chunk, double* mean, double* m2) const {
    if (geometry.plan.by_rows) {
      reduce_rows(g, chunk, mean, m2);
    } else {
      reduce_planes(g, chunk, *mean, *m2);
    }
  }

  void reduce_planes(int64_t c, int64_t chunk, double& mean, double& m2) const {
    const int64_t begin = geometry.first_step(chunk), end = geometry.end_step(chunk);
    const V zero(T(0));
    T shift;
    {
      const auto piece = geometry.piece(c, begin);
      const int64_t n = piece.length < 128 ? piece.length : 128;
      V total = zero;
      for (int64_t j = 0; j < n; j += L) {
        total = total +
                (n - j >= L ? load<T>(x + piece.offset + j) : load<T>(x + piece.offset + j, n - j));
      }
      shift = static_cast<T>(sum(total) / static_cast<double>(n));
    }
    P s[2] = {zero, zero}, q[2] = {zero, zero};
    int64_t done = 0, pending = 0;
    for (int64_t step = begin; step < end; ++step) {
      const auto piece = geometry.piece(c, step);
      const S* p = x + piece.offset;
      const P about{V(shift)};
      const int64_t ahead = geometry.template ahead<S>(c, step, end, piece);
      for_pair_blocks<T>(0, piece.length, [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
        prefetch_ahead<T>(p, j, lanes, ahead);
        P d = load<T>(p + j, lanes) - about;
        if constexpr (std::is_same_v<decltype(lanes), Rest>) {
          d = keep_first<S>(lanes.n, d);
        }
        s[u] = s[u] + d;
        q[u] = fma(d, d, q[u]);
      });
      pending += piece.length;
      if (pending < kPieceElements && step + 1 < end) continue;
      const double m = static_cast<double>(pending);
      const double d = sum(s[0] + s[1]) / m;
      const double square = sum(q[0] + q[1]) - d * d * m;
      if (done == 0) {
        mean = shift + d;
        m2 = square;
      } else {
        merge_moments(static_cast<double>(done), m, mean, m2, shift + d, square);
      }
      for (int u = 0; u < 2; ++u) s[u] = q[u] = zero;
      done += pending;
      pending = 0;
      shift = static_cast<T>(mean);
    }
  }

  void reduce_rows(int64_t g, int64_t chunk, double* mean, double* m2) const {
    const Group group = geometry.group(g);
    const int64_t begin = geometry.first_step(chunk), end = geometry.end_step(chunk);
    const BatchNormPlan& plan = geometry.plan;
    const bool together = reads_rows_together(plan, args.shape, kRows);
    Columns<T> shift, s, q;
    Sums sums;
    T channel[kMaxWidth];
    const auto values = [&](int64_t from, int64_t to) {
      return geometry.values_before(to) - geometry.values_before(from);
    };
    const auto clear = [&](T* p) {
      for (int64_t j = 0; j < group.width; j += 2 * L) store_pair(p + j, P(V(T(0))));
    };

    // The first shift: the mean of at least eight values where there are as many. A last chunk may
    // consist of the short last row alone.
    clear(s.at);
    const int64_t full_end = plan.tail > 0 && end == plan.steps ? end - 1 : end;
    const int64_t wanted = 1 + 7 / (plan.repeat * plan.segment);
    const bool short_row = full_end == begin;
    const int64_t seen = short_row ? 1 : full_end - begin < wanted ? full_end - begin : wanted;
    const int64_t seen_width = short_row ? plan.tail : group.width;
    for (int64_t step = begin; step < begin + seen; ++step) {
      add_columns(x + geometry.row(g, group, step).offset, s.at, seen_width);
    }
    geometry.fold(group, s.at, seen_width, sums.first);
    const double scale = 1.0 / values(begin, begin + seen);
    for (int64_t c = 0; c < group.channels; ++c) {
      channel[c] = static_cast<T>(sums.first[c] * scale);
    }

    for (int64_t step = begin; step < end;) {
      // The short last row is folded alone: its columns have fewer values.
      const int64_t stop = step >= full_end                  ? end
                           : full_end - step > kRowsPerFlush ? step + kRowsPerFlush
                                                             : full_end;
      geometry.spread(group, channel, shift.at);
      in_pair_order<S>(shift.at, group.width);
      clear(s.at);
      clear(q.at);
      int64_t width = group.width;
      int64_t r = step;
      for (; together && r + kRows <= stop; r += kRows) {
        add_rows<kRows>(x + geometry.row(g, group, r).offset, width, shift.at, s.at, q.at);
      }
      for (; r < stop; ++r) {
        const auto row = geometry.row(g, group, r);
        width = row.width;
        add_rows<1>(x + row.offset, width, shift.at, s.at, q.at);
      }
      in_element_order<S>(s.at, width);
      in_element_order<S>(q.at, width);
      geometry.fold(group, s.at, width, sums.first);
      geometry.fold(group, q.at, width, sums.second);
      const double n = values(begin, step), m = values(step, stop), inverse = 1.0 / m;
      for (int64_t c = 0; c < group.channels; ++c) {
        const double d = sums.first[c] * inverse;
        const double part = channel[c] + d, square = sums.second[c] - d * sums.first[c];
        if (step == begin) {
          mean[c] = part;
          m2[c] = square;
        } else {
          merge_moments(n, m, mean[c], m2[c], part, square);
        }
        channel[c] = static_cast<T>(mean[c]);
      }
      step = stop;
    }
  }

  // A few rows at a time, so that the sums are loaded and stored less often.
  static constexpr int kRows = 4;
  template <int R>
  BATCHOPS_INLINE void add_rows(const S* p, int64_t width, const T* shift, T* s, T* q) const {
    const int64_t stride = geometry.plan.row_stride;
    const bool far = geometry.plan.segment > 1;  // the hardware does not see the next rows coming
    for_pair_blocks<T>(0, width, [&](int64_t j, auto lanes, int) BATCHOPS_INLINE_LAMBDA {
      const P about = load_pair(shift + j);
      P sum_j = load_pair(s + j), square_j = load_pair(q + j);
      for (int k = 0; k < R; ++k) {
        // The next R rows: where they lie together, in the order of memory.
        if (far) {
          prefetch_pair<T>(p, (k + R) * stride + j);
        } else if (R > 1) {
          prefetch_pair<T>(p, R * (stride + j) + k * 2 * L);
        } else {
          prefetch_ahead<T>(p, j, lanes);
        }
        const P d = load<T>(p + k * stride + j, lanes) - about;
        sum_j = sum_j + d;
        square_j = fma(d, d, square_j);
      }
      store_pair(s + j, sum_j);
      store_pair(q + j, square_j);
    });
  }

  static void add_columns(const S* p, T* total, int64_t width) {
    for (int64_t j = 0; j < width; j += L) {
      const V row = width - j >= L ? load<T>(p + j) : load<T>(p + j, width - j);
      store(total + j, load<T>(total + j) + row);
    }
  }

  // Squares may overflow float where the values do not, and an infinity makes every shift NaN. So a
  // channel whose M2 is not finite is done again, in double from the start.
  void recompute(int64_t c, double& mean, double& m2) const {
    const BatchNormShape& shape = args.shape;
    const bool last = shape.layout == Layout::channels_last;
    const int64_t stride = last ? shape.C : 1;
    const auto plane = [&](int64_t n) {
      return x + (last ? n * shape.HxW * shape.C + c : (n * shape.C + c) * shape.HxW);
    };
    double total = 0;
    for (int64_t n = 0; n < shape.N && total == total; ++n) {
      for (int64_t i = 0; i < shape.HxW; ++i) total += to_float(plane(n)[i * stride]);
    }
    mean = total / static_cast<double>(shape.N * shape.HxW);
    m2 = mean - mean;  // NaN where the mean is not finite
    if (m2 != 0) return;
    for (int64_t n = 0; n < shape.N; ++n) {
      for (int64_t i = 0; i < shape.HxW; ++i) {
        const double d = to_float(plane(n)[i * stride]) - mean;
        m2 += d * d;
      }
    }
  }

  void set_stats(int64_t c, double mean, double var) const {
    stats.mean[c] = static_cast<T>(mean);
    const double low = mean - stats.mean[c];
    stats.low[c] = low == low ? static_cast<T>(low) : T(0);  // ∞ has no low part
    stats.rstd[c] = static_cast<T>(1.0 / std::sqrt(var + args.eps));
  }

  void finish(int64_t first, int64_t count, double* mean, double* m2) const {
    const double M = static_cast<double>(args.shape.N * args.shape.HxW);
    for (int64_t i = 0; i < count; ++i) {
      if (m2[i] - m2[i] != 0) recompute(first + i, mean[i], m2[i]);
      if (m2[i] < 0) m2[i] = 0;
      set_stats(first + i, mean[i], m2[i] / M);
    }
    if (moments == nullptr) {
      update_running(args, first, count, M, mean, m2);
    } else {
      std::memcpy(moments + first, mean, count * sizeof(double));
      std::memcpy(moments + args.shape.C + first, m2, count * sizeof(double));
    }
  }

  void take_running_stats() const {
    const int64_t C = args.shape.C;
    constexpr int64_t kPart = 128;
    double mean[kPart], var[kPart];
    for (int64_t first = 0; first < C; first += kPart) {
      const int64_t count = C - first < kPart ? C - first : kPart;
      read_channels(mean, args.running_mean, args.shape.running_dtype, first, count, 0.0);
      read_channels(var, args.running_var, args.shape.running_dtype, first, count, 1.0);
      for (int64_t i = 0; i < count; ++i) set_stats(first + i, mean[i], var[i]);
    }
  }
};
