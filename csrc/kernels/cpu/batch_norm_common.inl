// What the forward and the backward of batch norm share: parameters, mask bits, the order of work.

// The precision of the arithmetic and of `stats` for elements stored as S.
template <class S>
using AccOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// z without the residual. Forward and backward call this one, so that relu's sign agrees bit for
// bit.
template <class V>
BATCHOPS_INLINE V normalize(V x, V mean, V scale, V shift) {
  return fma(x - mean, scale, shift);
}

template <class Act, class Shape>
inline Act activation_of(const Shape& shape) {
  const auto slope = static_cast<Scalar>(shape.slope);
  if constexpr (std::is_same_v<Act, AnyActivation>) {
    return {shape.activation, slope};
  } else {
    return make_functor<Act>(slope);
  }
}

// ---------------------------------------------------------------------- scalars of any dtype

inline float to_float(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(Half a) {
  Half lanes[Vec<float>::kLanes] = {a};
  return load<float>(lanes).v[0];
}
inline float to_float(float a) { return a; }
inline double to_float(double a) { return a; }

template <class S, class T>
BATCHOPS_INLINE void put(S* p, T value) {
  if constexpr (sizeof(S) == 2) {
    store(p, Vec<float>(static_cast<float>(value)), 1);
  } else {
    *p = static_cast<S>(value);
  }
}

// Calls f with a null pointer of the storage type.
template <class F>
BATCHOPS_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
}

// The same for the elements of x and y, of which there are enough to choose the conversion.
template <class F>
BATCHOPS_INLINE void with_element(DType dtype, F&& f) {
#if defined(BATCHOPS_ISA_AVX512)
  if (dtype == DType::bf16 && has_avx512_bf16()) return f(static_cast<NativeBFloat16*>(nullptr));
#endif
  with_dtype(dtype, std::forward<F>(f));
}

// out[i] = values[first + i], or `otherwise` where there are no values.
template <class T>
inline void read_channels(T* out, const void* values, DType dtype, int64_t first, int64_t count,
                          T otherwise) {
  if (values == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = otherwise;
    return;
  }
  with_dtype(dtype, [&](auto* type) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(values) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(to_float(from[i]));
  });
}
template <class T>
inline void write_channels(void* values, DType dtype, int64_t first, int64_t count, const T* in) {
  if (values == nullptr) return;
  with_dtype(dtype, [&](auto* type) {
    auto* to = static_cast<std::remove_pointer_t<decltype(type)>*>(values) + first;
    for (int64_t i = 0; i < count; ++i) put(to + i, in[i]);
  });
}

// ------------------------------------------------------------- z = (x - mean) · scale + shift

// Channel values spread over the columns of a group. Room for a whole vector past the last column.
template <class T>
struct alignas(64) Columns {
  T at[kMaxWidth + 832 / sizeof(T)];
};

// The affine form for channels [first, first + count):
//   scale = rstd · weight,   shift = bias - low · scale,   low = the mean's part below rounding.
// The product is exact in double, so no contraction can change `shift`.
template <class T>
inline void affine_of(const T* stats, int64_t C, const void* weight, const void* bias,
                      DType param_dtype, int64_t first, int64_t count, T* mean, T* scale,
                      T* shift) {
  read_channels(scale, weight, param_dtype, first, count, T(1));
  read_channels(shift, bias, param_dtype, first, count, T(0));
  for (int64_t i = 0; i < count; ++i) {
    mean[i] = stats[first + i];
    scale[i] = stats[2 * C + first + i] * scale[i];
    shift[i] = static_cast<T>(static_cast<double>(shift[i]) -
                              static_cast<double>(stats[C + first + i]) * scale[i]);
  }
}

// Where a kernel takes its channel values from: one channel for the whole run, or a value for each
// column.
template <class T>
struct OneChannel {
  Vec<T> value;
  OneChannel() = default;
  BATCHOPS_INLINE explicit OneChannel(const T* p) : value(*p) {}
  BATCHOPS_INLINE Vec<T> operator[](int64_t) const { return value; }
};
template <class T>
struct EachColumn {
  const T* p = nullptr;
  EachColumn() = default;
  BATCHOPS_INLINE explicit EachColumn(const T* values) : p(values) {}
  BATCHOPS_INLINE Vec<T> operator[](int64_t j) const { return load<T>(p + j); }
};

// ------------------------------------------------------------------------------- runs

// Lanes of one access: all of a vector, or its first n.
struct All {};
struct First {
  int64_t n;
};
template <class T, class S>
BATCHOPS_INLINE Vec<T> load(const S* p, All) {
  return load<T>(p);
}
template <class T, class S>
BATCHOPS_INLINE Vec<T> load(const S* p, First part) {
  return load<T>(p, part.n);
}
template <class T, class S>
BATCHOPS_INLINE void put(S* p, Vec<T> a, All, bool past_cache) {
  if (past_cache) {
    stream(p, a);
  } else {
    store(p, a);
  }
}
template <class T, class S>
BATCHOPS_INLINE void put(S* p, Vec<T> a, First part, bool) {
  store(p, a, part.n);
}

template <class T>
constexpr int64_t kBlock = 4 * Vec<T>::kLanes;

// Calls vector(j, lanes, u) over [0, n), u counting 0…3 within a block of four, and
// begin(j, bytes) / end(j, bytes) around each block with the number of mask bytes it covers.
template <class T, class Begin, class Vector, class End>
BATCHOPS_INLINE void for_blocks(int64_t from, int64_t n, Begin&& begin, Vector&& vector,
                                End&& end) {
  constexpr int L = Vec<T>::kLanes;
  int64_t j = from;
  for (; j + kBlock<T> <= n; j += kBlock<T>) {
    begin(j, std::integral_constant<int, kBlock<T> / 8>{});
    vector(j, All{}, 0);
    vector(j + L, All{}, 1);
    vector(j + 2 * L, All{}, 2);
    vector(j + 3 * L, All{}, 3);
    end(j, std::integral_constant<int, kBlock<T> / 8>{});
  }
  if (j == n) return;
  const int64_t start = j;
  const int bytes = static_cast<int>((n - j + 7) / 8);
  begin(start, bytes);
  int u = 0;
  for (; j + L <= n; j += L) vector(j, All{}, u++);
  if (j < n) vector(j, First{n - j}, u);
  end(start, bytes);
}

// ------------------------------------------------------------------------------- mask bits

template <class Bytes>
BATCHOPS_INLINE uint64_t read_bits(const uint8_t* p, Bytes bytes) {
  uint64_t bits = 0;
  if constexpr (std::is_same_v<Bytes, int>) {
    for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(p[i]) << (8 * i);
  } else {
    std::memcpy(&bits, p, Bytes::value);
  }
  return bits;
}
template <class Bytes>
BATCHOPS_INLINE void write_bits(uint8_t* p, uint64_t bits, Bytes bytes) {
  if constexpr (std::is_same_v<Bytes, int>) {
    for (int i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(bits >> (8 * i));
  } else {
    std::memcpy(p, &bits, Bytes::value);
  }
}

// A kernel wants the bits of a row of columns in one string; the mask pads the run of each
// channel (or pixel) to whole bytes. `runs` runs of `length` bits, eight bytes of slack on `flat`.
inline void pad_runs(uint8_t* mask, const uint8_t* flat, int64_t runs, int64_t length) {
  int64_t position = 0;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t left = length; left > 0; left -= 56) {
      uint64_t bits;
      std::memcpy(&bits, flat + position / 8, 8);
      bits >>= position % 8;
      if (left >= 56) {
        std::memcpy(mask, &bits, 7);
        mask += 7;
        position += 56;
      } else {
        bits &= (uint64_t{1} << left) - 1;
        const int64_t bytes = (left + 7) / 8;
        for (int64_t i = 0; i < bytes; ++i) *mask++ = static_cast<uint8_t>(bits >> (8 * i));
        position += left;
      }
    }
  }
}
inline void join_runs(uint8_t* flat, const uint8_t* mask, int64_t runs, int64_t length) {
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t left = length; left > 0; left -= 32) {
      const int count = static_cast<int>(left < 32 ? left : 32);
      uint32_t bits = 0;
      if (count == 32) {
        std::memcpy(&bits, mask, 4);
        mask += 4;
      } else {
        for (int i = 0; i < (count + 7) / 8; ++i) {
          bits |= static_cast<uint32_t>(*mask++) << (8 * i);
        }
      }
      pending |= static_cast<uint64_t>(bits) << filled;
      filled += count;
      if (filled >= 32) {
        std::memcpy(flat, &pending, 4);
        flat += 4;
        pending >>= 32;
        filled -= 32;
      }
    }
  }
  std::memcpy(flat, &pending, 8);
}

struct FlatBits {
  alignas(64) uint8_t at[kMaxWidth / 8 + 16];
};

// ------------------------------------------------------------------------------- geometry

struct Group {
  int64_t first_channel;
  int64_t channels;
  int64_t width;  // of a full row
};

struct Geometry {
  const BatchNormShape& shape;
  BatchNormPlan plan;

  explicit Geometry(const BatchNormShape& s) : shape(s), plan(plan_batch_norm(s)) {}

  BATCHOPS_INLINE Group group(int64_t g) const {
    if (!plan.by_rows) return {g, 1, 0};
    const int64_t start = g * plan.width, left = plan.row_stride - start;
    const int64_t width = left < plan.width ? left : plan.width;
    if (plan.repeat > 1) return {0, shape.C, width};
    return {start / plan.segment, width / plan.segment, width};
  }
  int64_t first_step(int64_t chunk) const { return chunk * plan.steps_per_chunk; }
  int64_t end_step(int64_t chunk) const {
    const int64_t end = (chunk + 1) * plan.steps_per_chunk;
    return end < plan.steps ? end : plan.steps;
  }
  double values_before(int64_t step) const {
    return static_cast<double>(batchops::values_before(plan, shape, step));
  }

  // Plane kernel: where step `step` of channel c lies.
  struct Piece {
    int64_t offset, length, mask;
  };
  BATCHOPS_INLINE Piece piece(int64_t c, int64_t step) const {
    const int64_t n = step / plan.pieces_per_plane;
    const int64_t start = (step - n * plan.pieces_per_plane) * plan.piece;
    const int64_t plane = n * shape.C + c, left = shape.HxW - start;
    return {plane * shape.HxW + start, left < plan.piece ? left : plan.piece,
            plane * ((shape.HxW + 7) / 8) + start / 8};
  }

  // Row kernel: columns of group g in row `step`, and how its mask bits are padded.
  struct Row {
    int64_t offset, width, mask, runs, run;
  };
  BATCHOPS_INLINE Row row(int64_t g, const Group& group, int64_t step) const {
    const int64_t offset = step * plan.row_stride + g * plan.width;
    const bool is_tail = plan.tail > 0 && step == plan.steps - 1;
    const int64_t width = is_tail ? plan.tail : group.width;
    if (plan.segment > 1) {
      const int64_t plane_bytes = (shape.HxW + 7) / 8;
      return {offset, width, (step * shape.C + group.first_channel) * plane_bytes, group.channels,
              shape.HxW};
    }
    if (shape.layout == Layout::channels_first) {  // HxW = 1: a mask row is a single bit
      return {offset, width, offset, width, 1};
    }
    const int64_t pixel_bytes = (shape.C + 7) / 8;
    return {offset, width, step * plan.repeat * pixel_bytes + g * plan.width / 8,
            plan.repeat > 1 ? width / shape.C : 1, plan.repeat > 1 ? shape.C : width};
  }

  // Column values from channel values, and channel sums from column sums.
  template <class T>
  void spread(const Group& group, const T* channels, T* columns) const {
    if (plan.segment > 1) {
      for (int64_t c = 0; c < group.channels; ++c) {
        for (int64_t i = 0; i < plan.segment; ++i) *columns++ = channels[c];
      }
    } else {
      for (int64_t k = 0; k < plan.repeat; ++k, columns += group.channels) {
        for (int64_t c = 0; c < group.channels; ++c) columns[c] = channels[c];
      }
    }
  }
  template <class T>
  void fold(const Group& group, const T* columns, int64_t width, double* channels) const {
    constexpr int L = Vec<T>::kLanes;
    if (plan.segment > 1) {
      for (int64_t c = 0; c < group.channels; ++c, columns += plan.segment) {
        Vec<T> total(T(0));
        int64_t i = 0;
        for (; i + L <= plan.segment; i += L) total = total + load<T>(columns + i);
        if (i < plan.segment) total = total + load<T>(columns + i, plan.segment - i);
        channels[c] = sum(total);
      }
    } else {
      for (int64_t c = 0; c < group.channels; ++c) channels[c] = columns[c];
      for (int64_t j = group.channels; j < width; j += group.channels) {
        for (int64_t c = 0; c < group.channels; ++c) channels[c] += columns[j + c];
      }
    }
  }
};

// ------------------------------------------------------------------------------- order of work

// Below this many elements a fork costs more than it saves.
constexpr int64_t kForkElements = 32768;
// Outputs from this size on are not read back from the cache by what follows.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline bool streams(const BatchNormShape& shape) {
  return shape.numel() * size_of(shape.dtype) >= kStreamBytes;
}

// Several rows at a time share the loads of the channel values. That pays while the tensor is in
// the cache. From memory, strictly ascending reads and whole lines of one row after the other are
// worth more; but where rows lie far apart anyhow (segment > 1) reading several costs nothing.
inline bool reads_rows_together(const BatchNormPlan& plan, const BatchNormShape& shape) {
  return plan.segment > 1 || !streams(shape);
}
inline bool writes_rows_together(const BatchNormShape& shape) { return !streams(shape); }

// Two sums a channel in double, for one chunk or for all of them.
struct alignas(64) Sums {
  double first[kMaxWidth], second[kMaxWidth];
};

template <class Pass>
inline const char* apply_only(const Geometry& geometry, const Parallel& par, Pass& pass) {
  const BatchNormPlan& plan = geometry.plan;
  par(plan.chunks * plan.groups, [&](int64_t begin, int64_t end) {
    if (plan.groups == 1) {
      pass.apply(0, begin, end);
    } else {
      for (int64_t task = begin; task < end; ++task) {
        pass.apply(task % plan.groups, task / plan.groups, task / plan.groups + 1);
      }
    }
    fence();
  });
  return nullptr;
}

// Runs pass.reduce over the chunks of every group, pass.finish when a group is complete and then
// pass.apply over its chunks. Where there are enough groups a thread takes whole groups, and finds
// them in its cache when it applies; else the threads share out the chunks of all groups, and the
// chunk sums wait in memory. Both merge the same chunks in the same order.
//
//   reduce(g, chunk, first, second)               sums of this chunk
//   merge(chunk, count, first, second, f, s)      adds chunk sums (f, s) of `count` channels
//   finish(channel, count, first, second)         complete sums of `count` channels
//   apply(g, begin chunk, end chunk)
template <class Pass>
inline const char* reduce_and_apply(const Geometry& geometry, const Parallel& par, Pass& pass,
                                    bool apply) {
  const BatchNormPlan& plan = geometry.plan;
  const int64_t threads = par.threads;
  const int64_t share = (plan.groups + threads - 1) / threads;
  const bool whole_groups = plan.chunks == 1 || 4 * plan.groups >= 3 * share * threads;
  if (whole_groups) {
    par(plan.groups, [&](int64_t begin, int64_t end) {
      Sums total, chunk_sums;
      for (int64_t g = begin; g < end; ++g) {
        const Group group = geometry.group(g);
        pass.reduce(g, 0, total.first, total.second);
        for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
          pass.reduce(g, chunk, chunk_sums.first, chunk_sums.second);
          pass.merge(chunk, group.channels, total.first, total.second, chunk_sums.first,
                     chunk_sums.second);
        }
        pass.finish(group.first_channel, group.channels, total.first, total.second);
        if (apply) pass.apply(g, 0, plan.chunks);
      }
      fence();
    });
    return nullptr;
  }

  // [chunk][sum][channel]
  const int64_t C = geometry.shape.C;
  std::unique_ptr<double[]> memory(new (std::nothrow) double[plan.chunks * 2 * C]);
  if (memory == nullptr) return "batch_norm: out of memory for the partial sums";
  double* const partial = memory.get();
  par(plan.chunks * plan.groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / plan.groups, g = task % plan.groups;
      double* at = partial + chunk * 2 * C + geometry.group(g).first_channel;
      pass.reduce(g, chunk, at, at + C);
    }
  });
  constexpr int64_t kMergeChannels = 128;
  const auto merge = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kMergeChannels;
      const int64_t count = C - c < kMergeChannels ? C - c : kMergeChannels;
      double* first = partial + c;
      double* second = first + C;
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
        pass.merge(chunk, count, first, second, first + chunk * 2 * C, second + chunk * 2 * C);
      }
      pass.finish(c, count, first, second);
    }
  };
  const int64_t blocks = (C + kMergeChannels - 1) / kMergeChannels;
  if (plan.chunks * C > kForkElements) {
    par(blocks, merge);
  } else {
    merge(0, blocks);
  }
  if (apply) return apply_only(geometry, par, pass);
  return nullptr;
}
