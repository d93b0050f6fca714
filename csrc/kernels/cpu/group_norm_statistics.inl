// The mean and M2 = Σ (x - mean)² of groups, about a running shift.
//
// A sum of squares about a shift K loses nothing as long as K lies near the mean. So K starts as
// the mean of a stretch's first values and becomes the mean so far whenever the sums (float, over a
// few thousand values) are handed on to double (merge_moments: Chan, Golub, LeVeque 1979).

template <class S>
struct GroupStatistics {
  using T = AccOf<S>;
  using V = Vec<T>;
  static constexpr int L = V::kLanes;

  const GroupNormForward& args;
  const GroupNormPlan& plan;
  const GroupNormShape& shape = args.shape;
  const RowGeometry rows{shape, plan};
  const S* const x = static_cast<const S*>(args.x);
  T* const stats = static_cast<T*>(args.stats);

  // n values in a row, n > 0.
  static void of_stretch(const S* p, int64_t n, double& mean, double& m2) {
    const V zero(T(0));
    T shift;
    {
      const int64_t first = n < 4 * L ? n : 4 * L;
      V total = zero;
      for (int64_t j = 0; j < first; j += L) {
        total = total + (first - j >= L ? load<T>(p + j) : load<T>(p + j, first - j));
      }
      shift = static_cast<T>(sum(total) / static_cast<double>(first));
    }
    for (int64_t done = 0; done < n;) {
      const int64_t count = n - done < kPieceElements ? n - done : kPieceElements;
      const S* from = p + done;
      const V about(shift);
      Pair<T> s[2] = {zero, zero}, q[2] = {zero, zero};
      for_pairs<T, 2>(0, count, [&](int64_t j, auto lanes, int u) BATCHOPS_INLINE_LAMBDA {
        prefetch_ahead<T>(from, j, lanes);
        Pair<T> d = load<T>(from + j, lanes) - about;
        if constexpr (std::is_same_v<decltype(lanes), Rest>) d = keep_first<S>(lanes.n, d);
        s[u] = s[u] + d;
        q[u] = fma(d, d, q[u]);
      });
      const double m = static_cast<double>(count);
      const double d = sum(s[0] + s[1]) / m;
      const double square = sum(q[0] + q[1]) - d * d * m;
      if (done == 0) {
        mean = shift + d;
        m2 = square;
      } else {
        merge_moments(static_cast<double>(done), m, mean, m2, shift + d, square);
      }
      done += count;
      shift = static_cast<T>(mean);
    }
  }

  // Planes: chunk `chunk` of group `unit`.
  void of_planes(int64_t unit, int64_t chunk, double& mean, double& m2) const {
    const int64_t begin = begin_of_chunk(plan, shape.HxW, chunk);
    const int64_t end = begin_of_chunk(plan, shape.HxW, chunk + 1);
    of_stretch(x + unit * plan.M + begin, end - begin, mean, m2);
  }

  // Pixels: chunk `chunk` of sample n, all groups. `columns` is scratch for three rows, `sums` for
  // two of G.
  void of_pixels(int64_t n, int64_t chunk, const ScratchRows<T>& columns, double* sums,
                 double* mean, double* m2) const {
    const int64_t G = shape.G, begin = rows.first_step(chunk), end = rows.end_step(chunk);
    const int64_t full_end = plan.tail > 0 && end == plan.steps ? end - 1 : end;
    T* const about = columns[0];
    T* const s = columns[1];
    T* const q = columns[2];
    double* const first = sums;
    double* const second = sums + G;
    const auto clear = [&](T* p) {
      for (int64_t j = 0; j < plan.width; j += 2 * L) store_pair(p + j, Pair<T>(V(T(0))));
    };
    const auto values = [&](int64_t from, int64_t to) {
      const int64_t pixels = (to < plan.steps ? to * plan.repeat : shape.HxW) - from * plan.repeat;
      return static_cast<double>(pixels * plan.D);
    };
    const auto set_shift = [&](const double* of_group) {
      const int64_t D = plan.D;
      for (int64_t j = 0, r = 0; r < plan.repeat; ++r) {
        for (int64_t g = 0; g < G; ++g) {
          const T value = static_cast<T>(of_group[g]);
          for (int64_t i = 0; i < D; ++i) about[j++] = value;
        }
      }
    };
    // The first shift: the mean of at least 64 values a group, where there are as many.
    {
      const int64_t wanted = 1 + 63 / (plan.repeat * plan.D);
      const int64_t stop = begin + (wanted < end - begin ? wanted : end - begin);
      clear(s);
      for (int64_t g = 0; g < G; ++g) first[g] = 0;
      for (int64_t step = begin; step < stop; ++step) {
        const S* p = x + rows.row_offset(n, step);
        for_pairs<T>(0, rows.row_width(step),
                     [&](int64_t j, auto lanes, int) BATCHOPS_INLINE_LAMBDA {
                       store_pair(s + j, load_pair(s + j) + load<T>(p + j, lanes));
                     });
      }
      in_element_order<S>(s, plan.width);
      rows.fold_groups(s, plan.width, first);
      const double inverse = 1.0 / values(begin, stop);
      for (int64_t g = 0; g < G; ++g) mean[g] = first[g] * inverse;
    }
    const bool together = !streams(shape) || sums_wait(shape.dtype, 4, plan.width);
    for (int64_t step = begin; step < end;) {
      // The short last row is folded alone: its columns have fewer values.
      const int64_t stop = step >= full_end                  ? end
                           : full_end - step > kRowsPerFlush ? step + kRowsPerFlush
                                                             : full_end;
      set_shift(mean);
      in_pair_order<S>(about, plan.width);
      clear(s);
      clear(q);
      const int64_t width = rows.row_width(step);
      int64_t r = step;
      for (; together && r + 4 <= stop; r += 4) {
        add_rows<4>(x + rows.row_offset(n, r), width, about, s, q);
      }
      for (; r < stop; ++r) add_rows<1>(x + rows.row_offset(n, r), width, about, s, q);
      in_element_order<S>(s, width);
      in_element_order<S>(q, width);
      for (int64_t g = 0; g < 2 * G; ++g) sums[g] = 0;
      rows.fold_groups(s, width, first);
      rows.fold_groups(q, width, second);
      const double before = values(begin, step), m = values(step, stop), inverse = 1.0 / m;
      for (int64_t g = 0; g < G; ++g) {
        const double d = first[g] * inverse;
        const double part = static_cast<T>(mean[g]) + d, square = second[g] - d * first[g];
        if (step == begin) {
          mean[g] = part;
          m2[g] = square;
        } else {
          merge_moments(before, m, mean[g], m2[g], part, square);
        }
      }
      step = stop;
    }
  }

  template <int R>
  BATCHOPS_INLINE void add_rows(const S* p, int64_t width, const T* about, T* s, T* q) const {
    const int64_t stride = plan.width;
    for_pairs<T>(0, width, [&](int64_t j, auto lanes, int) BATCHOPS_INLINE_LAMBDA {
      const Pair<T> shift = load_pair(about + j);
      Pair<T> sum_j = load_pair(s + j), square_j = load_pair(q + j);
      for (int k = 0; k < R; ++k) {
        // The next R rows, in the order of memory.
        if constexpr (R > 1) {
          prefetch(p, R * (stride + j) + k * 2 * L);
        } else {
          prefetch_ahead<T>(p, j, lanes);
        }
        const Pair<T> d = load<T>(p + k * stride + j, lanes) - shift;
        sum_j = sum_j + d;
        square_j = fma(d, d, square_j);
      }
      // Lanes past the row's end gather -shift, in columns that nobody reads.
      store_pair(s + j, sum_j);
      store_pair(q + j, square_j);
    });
  }

  // Values of a group in the chunks before `chunk`.
  double values_before(int64_t chunk) const {
    if (plan.kind == GroupNormPlan::planes) {
      return static_cast<double>(begin_of_chunk(plan, shape.HxW, chunk));
    }
    const int64_t steps = chunk * plan.chunk_rows;
    const int64_t pixels = steps < plan.steps ? steps * plan.repeat : shape.HxW;
    return static_cast<double>(pixels * plan.D);
  }
  void merge(int64_t chunk, double& mean, double& m2, double chunk_mean, double chunk_m2) const {
    const double n = values_before(chunk);
    merge_moments(n, values_before(chunk + 1) - n, mean, m2, chunk_mean, chunk_m2);
  }

  // Squares may overflow float where the values do not, and an infinity makes every shift NaN. So a
  // group whose M2 is not finite is done again, in double from the start.
  void recompute(int64_t index, double& mean, double& m2) const {
    const bool last = plan.kind == GroupNormPlan::pixels;
    const int64_t runs = last ? shape.HxW : 1, run = last ? plan.D : plan.M;
    const int64_t n = index / shape.G, g = index % shape.G;
    const S* const first = x + n * shape.C * shape.HxW + g * run;
    double total = 0;
    for (int64_t r = 0; r < runs && total == total; ++r) {
      for (int64_t i = 0; i < run; ++i) total += to_float(first[r * shape.C + i]);
    }
    mean = total / static_cast<double>(plan.M);
    m2 = mean - mean;  // NaN where the mean is not finite
    if (m2 != 0) return;
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < run; ++i) {
        const double d = to_float(first[r * shape.C + i]) - mean;
        m2 += d * d;
      }
    }
  }

  void finish(int64_t index, double mean, double m2) const {
    if (m2 - m2 != 0) recompute(index, mean, m2);
    if (m2 < 0) m2 = 0;
    const int64_t groups = shape.N * shape.G;
    stats[index] = static_cast<T>(mean);
    const double low = mean - stats[index];
    stats[groups + index] = low == low ? static_cast<T>(low) : T(0);  // ∞ has no low part
    stats[2 * groups + index] =
        static_cast<T>(1.0 / std::sqrt(m2 / static_cast<double>(plan.M) + args.eps));
  }
};
