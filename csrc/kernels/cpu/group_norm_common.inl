// What the forward and the backward of group norm share: channel values, statistics of one group,
// the way columns belong to channels and groups, scratch memory and the order of work.

// Begins with a cache line: a vector that lies across two of them costs twice, a store more.
template <class T>
struct Scratch {
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T[], Free> memory;

  // Room for a whole vector past the end, zeros there, so that a load may run over.
  bool allocate(int64_t count) {
    const int64_t padded = count + 64;
    memory.reset(static_cast<T*>(::operator new(padded * sizeof(T), kAlignment, std::nothrow)));
    if (memory == nullptr) return false;
    for (int64_t i = count; i < padded; ++i) memory[i] = T(0);
    return true;
  }
  T* get() const { return memory.get(); }
};
// The next row's beginning after `width` values, with room for a vector between.
constexpr int64_t padded(int64_t width) { return (width + 64 + 63) / 64 * 64; }

constexpr const char* kOutOfMemory = "group_norm: out of memory for the channel values and sums";

// [row][column] with `width` columns a row: one allocation for the arrays of one thread.
template <class T>
struct ScratchRows {
  Scratch<T> scratch;
  int64_t stride = 0;
  bool allocate(int64_t rows, int64_t width) {
    stride = padded(width);
    if (!scratch.allocate(rows * stride)) return false;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = width; j < stride; ++j) (*this)[row][j] = T(0);
    }
    return true;
  }
  T* operator[](int64_t row) const { return scratch.get() + row * stride; }
};

// Columns of a row, and what belongs to them.
struct RowGeometry {
  const GroupNormShape& shape;
  const GroupNormPlan& plan;

  // out[j] = channels[channel of column j]
  template <class T>
  void spread_channels(const T* channels, T* out) const {
    if (plan.kind == GroupNormPlan::rows) {
      for (int64_t c = 0; c < shape.C; ++c) {
        for (int64_t i = 0; i < shape.HxW; ++i) *out++ = channels[c];
      }
    } else {
      for (int64_t r = 0; r < plan.repeat; ++r) {
        for (int64_t c = 0; c < shape.C; ++c) *out++ = channels[c];
      }
    }
  }
  // out[j] = groups[group of column j]
  template <class T>
  void spread_groups(const T* groups, T* out) const {
    const int64_t run = plan.kind == GroupNormPlan::rows ? plan.M : plan.D;
    for (int64_t r = 0; r < plan.repeat; ++r) {
      for (int64_t g = 0; g < shape.G; ++g) {
        const T value = groups[g];
        for (int64_t i = 0; i < run; ++i) *out++ = value;
      }
    }
  }
  // channels[c] += the columns of channel c, of the first `width` columns; width is a multiple of C
  template <class T>
  void fold_channels(const T* columns, int64_t width, double* channels) const {
    if (plan.kind == GroupNormPlan::rows && shape.HxW == 1) {
      for (int64_t c = 0; c < shape.C; ++c) channels[c] += columns[c];
    } else if (plan.kind == GroupNormPlan::rows) {
      for (int64_t c = 0; c < shape.C; ++c) {
        double total = 0;
        for (int64_t i = 0; i < shape.HxW; ++i) total += *columns++;
        channels[c] += total;
      }
    } else {
      for (int64_t j = 0; j < width; j += shape.C) {
        for (int64_t c = 0; c < shape.C; ++c) channels[c] += columns[j + c];
      }
    }
  }
  // groups[g] += the columns of group g (pixels)
  template <class T>
  void fold_groups(const T* columns, int64_t width, double* groups) const {
    constexpr int L = Vec<T>::kLanes;
    for (int64_t j = 0; j < width; j += shape.C) {
      for (int64_t g = 0; g < shape.G; ++g) {
        const T* p = columns + j + g * plan.D;
        double total = 0;
        int64_t i = 0;
        if (plan.D >= L) {
          Vec<T> lanes = load<T>(p);
          for (i = L; i + L <= plan.D; i += L) lanes = lanes + load<T>(p + i);
          total = sum(lanes);
        }
        for (; i < plan.D; ++i) total += p[i];
        groups[g] += total;
      }
    }
  }
  int64_t row_width(int64_t step) const {
    return plan.tail > 0 && step == plan.steps - 1 ? plan.tail : plan.width;
  }
  int64_t row_offset(int64_t n, int64_t step) const {
    return n * shape.C * shape.HxW + step * plan.width;
  }
  int64_t first_step(int64_t chunk) const { return chunk * plan.chunk_rows; }
  int64_t end_step(int64_t chunk) const {
    const int64_t end = (chunk + 1) * plan.chunk_rows;
    return end < plan.steps ? end : plan.steps;
  }

  // The mask of a row: `runs` runs of `run` bits, each padded to whole bytes.
  int64_t run() const { return shape.layout == Layout::channels_first ? shape.HxW : shape.C; }
  int64_t runs(int64_t width) const { return width / run(); }
  int64_t mask_offset(int64_t n, int64_t step) const {
    const int64_t first = row_offset(n, step) / run();
    return first * ((run() + 7) / 8);
  }
  bool joined(int64_t width) const { return runs(width) > 1 && run() % 8 != 0; }
};

// rstd, and the mean in two parts, of one group.
template <class T>
struct GroupStats {
  T hi, low, rstd;

  GroupStats(const T* stats, int64_t groups, int64_t index)
      : hi(stats[index]), low(stats[groups + index]), rstd(stats[2 * groups + index]) {}
  T scale(T weight) const { return rstd * weight; }
  T shift(T scale, T bias) const {
    return static_cast<T>(static_cast<double>(bias) - static_cast<double>(low) * scale);
  }
};

// Whether every thread has whole units to work on. Else the chunks of all units are shared out.
inline bool takes_whole_units(const GroupNormPlan& plan, const Parallel& par) {
  const int64_t share = (plan.units + par.threads - 1) / par.threads;
  return plan.chunks == 1 || 4 * plan.units >= 3 * share * par.threads;
}

// Planes: whether the next group should be on its way while this one's outputs are made from the
// cache. The memory would idle; but a large group would leave the next no room.
inline bool asks_for_next_group(const GroupNormPlan& plan) { return plan.chunks == 1; }

// weight and bias, one for each channel (planes) or each column.
template <class T>
struct AffineValues {
  Scratch<T> memory;
  T* weight = nullptr;
  T* bias = nullptr;

  template <class Args>
  bool read(const Args& args, const GroupNormPlan& plan) {
    const GroupNormShape& shape = args.shape;
    const bool direct = plan.width == shape.C;
    const int64_t width = direct ? shape.C : plan.width;
    Scratch<T> channels;
    if (!memory.allocate(2 * padded(width))) return false;
    if (!direct && !channels.allocate(shape.C)) return false;
    weight = memory.get();
    bias = weight + padded(width);
    for (int64_t i = width; i < padded(width); ++i) weight[i] = bias[i] = T(0);
    const auto fill = [&](T* to, const void* from, T otherwise) {
      read_channels(direct ? to : channels.get(), from, shape.param_dtype, 0, shape.C, otherwise);
      if (!direct) RowGeometry{shape, plan}.spread_channels(channels.get(), to);
    };
    fill(weight, args.weight, T(1));
    fill(bias, args.bias, T(0));
    return true;
  }
};

// Where a row of elements of S takes (mean, scale, shift) of its columns from: arrays in pair
// order, or the one group that fills the row and the weight and bias of each column; and the
// channel that a plane belongs to.
template <class S, class T = AccOf<S>>
struct ColumnAffine {
  static constexpr bool kAnywhere = !kSwapped<S>;  // whether pairs may begin at any column
  static constexpr bool kPrefetches = false;       // whether the next row is worth asking for
  const T* at_mean;
  const T* at_scale;
  const T* at_shift;
  BATCHOPS_INLINE auto mean(int64_t j, auto lanes) const { return load_whole(at_mean + j, lanes); }
  BATCHOPS_INLINE auto scale(int64_t j, auto lanes) const {
    return load_whole(at_scale + j, lanes);
  }
  BATCHOPS_INLINE auto shift(int64_t j, auto lanes) const {
    return load_whole(at_shift + j, lanes);
  }
};
template <class S, class T = AccOf<S>>
struct RowAffine {
  static constexpr bool kAnywhere = true, kPrefetches = true;
  Vec<T> hi, rstd, minus_low;
  const T* weight;
  const T* bias;
  RowAffine(const GroupStats<T>& s, const T* w, const T* b)
      : hi(s.hi), rstd(s.rstd), minus_low(-s.low * s.rstd), weight(w), bias(b) {}
  BATCHOPS_INLINE Vec<T> mean(int64_t, auto) const { return hi; }
  BATCHOPS_INLINE auto scale(int64_t j, auto lanes) const {
    return rstd * pair_order<S>(load_whole(weight + j, lanes));
  }
  BATCHOPS_INLINE auto shift(int64_t j, auto lanes) const {
    return fma(minus_low, pair_order<S>(load_whole(weight + j, lanes)),
               pair_order<S>(load_whole(bias + j, lanes)));
  }
};

template <class T>
struct PlaneAffine {
  static constexpr bool kAnywhere = true, kPrefetches = false;
  Vec<T> of_mean, of_scale, of_shift;
  BATCHOPS_INLINE Vec<T> mean(int64_t, auto) const { return of_mean; }
  BATCHOPS_INLINE Vec<T> scale(int64_t, auto) const { return of_scale; }
  BATCHOPS_INLINE Vec<T> shift(int64_t, auto) const { return of_shift; }
};

// The columns' mean, scale and shift of sample n.
template <class T>
inline void column_affine(const RowGeometry& rows, const T* stats, int64_t n,
                          const AffineValues<T>& affine, T* mean, T* scale, T* shift) {
  const GroupNormShape& shape = rows.shape;
  const int64_t run = rows.plan.kind == GroupNormPlan::rows ? rows.plan.M : rows.plan.D;
  int64_t j = 0;
  for (int64_t r = 0; r < rows.plan.repeat; ++r) {
    for (int64_t g = 0; g < shape.G; ++g) {
      const GroupStats<T> s(stats, shape.N * shape.G, n * shape.G + g);
      for (int64_t i = 0; i < run; ++i, ++j) {
        mean[j] = s.hi;
        scale[j] = s.scale(affine.weight[j]);
        shift[j] = s.shift(scale[j], affine.bias[j]);
      }
    }
  }
}

// Calls vector(j, lanes, scale, shift) over elements [begin, end) of a group of planes in the order
// of memory, by vectors (within a plane by pairs) that end where one of `out` ends: those on the
// border of two planes take the channel values of both. enter(d) gives the {first, second} values
// of the group's channel d.
template <class T, class S, class Enter, class Vector>
BATCHOPS_INLINE void for_planes_in_order(int64_t begin, int64_t end, int64_t HxW, const S* out,
                                         Enter&& enter, Vector&& vector) {
  constexpr int64_t L = Vec<T>::kLanes;
  int64_t d = begin / HxW, plane_end = (d + 1) * HxW;
  auto now = enter(d);
  const auto border = [&](int64_t j, auto lanes) BATCHOPS_INLINE_LAMBDA {
    const int64_t left = plane_end - j;
    const auto before = now;
    plane_end += HxW;
    now = enter(++d);
    vector(j, lanes, first_of(left, before.first, now.first),
           first_of(left, before.second, now.second));
  };
  const auto part = [&](int64_t j, int64_t n) BATCHOPS_INLINE_LAMBDA {
    if (j + n <= plane_end) {
      vector(j, First{n}, now.first, now.second);
    } else {
      border(j, First{n});
    }
  };
  int64_t j = begin;
  if (const int64_t head = to_boundary<T>(out + begin); head > 0) {
    const int64_t n = head < end - begin ? head : end - begin;
    part(j, n);
    j += n;
  }
  while (true) {
    const int64_t stop = plane_end < end ? plane_end : end;
    for (; j + 2 * L <= stop; j += 2 * L) vector(j, Two{}, now.first, now.second);
    if (j + L <= stop) {
      vector(j, All{}, now.first, now.second);
      j += L;
    }
    if (j + L > end) break;
    if (j == plane_end) {
      plane_end += HxW;
      now = enter(++d);
    } else {
      border(j, All{});
      j += L;
    }
  }
  if (j == end) return;
  if (j == plane_end) {
    plane_end += HxW;
    now = enter(++d);
  }
  part(j, end - j);
}
