// What the forward and the backward of batch norm share: channel values, geometry, the order of
// work.

// ------------------------------------------------------------- z = (x - mean) · scale + shift

// Channel values spread over the columns of a group. Room for a whole vector past the last column.
template <class T>
struct alignas(64) Columns {
  T at[kMaxWidth + 832 / sizeof(T)];
};

// The columns of `stats` that belong to ghost batch k: a value for each channel.
template <class T>
struct ChannelStats {
  T *mean, *low, *rstd;

  template <class Void>
  ChannelStats(Void* stats, const BatchNormShape& shape, int64_t k) {
    mean = static_cast<T*>(stats) + k * shape.C;
    low = mean + shape.ghosts() * shape.C;
    rstd = low + shape.ghosts() * shape.C;
  }
};

// The affine form for channels [first, first + count):
//   scale = rstd · weight,   shift = bias - low · scale,   low = the mean's part below rounding.
// The product is exact in double, so no contraction can change `shift`.
template <class T, class Stat>
BATCHOPS_NOINLINE void affine_of(const ChannelStats<Stat>& stats, const void* weight,
                                 const void* bias, DType param_dtype, int64_t first, int64_t count,
                                 T* mean, T* scale, T* shift) {
  read_channels(scale, weight, param_dtype, first, count, T(1));
  read_channels(shift, bias, param_dtype, first, count, T(0));
  for (int64_t i = 0; i < count; ++i) {
    mean[i] = stats.mean[first + i];
    scale[i] = stats.rstd[first + i] * scale[i];
    shift[i] = static_cast<T>(static_cast<double>(shift[i]) -
                              static_cast<double>(stats.low[first + i]) * scale[i]);
  }
}

// Where a kernel takes its channel values from: one channel for the whole run, or a value for each
// column, in the order of pairs.
template <class T>
struct OneChannel {
  Vec<T> value;
  static constexpr bool kAnywhere = true;  // a pair may begin at any column
  OneChannel() = default;
  BATCHOPS_INLINE explicit OneChannel(const T* p) : value(*p) {}
  BATCHOPS_INLINE Pair<T> operator[](int64_t) const { return value; }
};
template <class T, class S>
struct EachColumn {
  const T* p = nullptr;
  static constexpr bool kAnywhere = !kSwapped<S>;
  EachColumn() = default;
  BATCHOPS_INLINE explicit EachColumn(const T* values) : p(values) {}
  BATCHOPS_INLINE Pair<T> operator[](int64_t j) const { return load_pair(p + j); }
};

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
  // Whether apply() finds no longer in the cache what reduce() has read.
  BATCHOPS_INLINE bool rereads() const { return plan.by_rows && plan.segment == 1; }

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

  // How far ahead of piece `step`, of those before `end`, lies what a kernel reads a kilobyte
  // later: past the end of a short piece it is the next one.
  template <class S>
  BATCHOPS_INLINE int64_t ahead(int64_t c, int64_t step, int64_t end, const Piece& now) const {
    if (now.length > kAhead<S> || step + 1 == end) return kAhead<S>;
    return piece(c, step + 1).offset - now.offset;
  }
  // The same for a kernel that reads a channel of so many tensors once more, or 0: longer pieces
  // only where the core's own cache has lost the first ones.
  template <class S>
  BATCHOPS_INLINE int64_t ahead_again(int64_t tensors, int64_t c, int64_t step, int64_t end,
                                      const Piece& now) const {
    constexpr int64_t kCacheBytes = int64_t{2} << 20;
    const int64_t bytes = tensors * shape.N * shape.HxW * static_cast<int64_t>(sizeof(S));
    return bytes > kCacheBytes || now.length <= kAhead<S> ? ahead<S>(c, step, end, now) : 0;
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

// Several rows at a time share the loads of the channel values. That pays while the tensor is in
// the cache. From memory, strictly ascending reads and whole lines of one row after the other are
// worth more; but where rows lie far apart anyhow (segment > 1) reading several costs nothing, and
// see sums_wait().
inline bool reads_rows_together(const BatchNormPlan& plan, const BatchNormShape& shape, int rows) {
  return plan.segment > 1 || !streams(shape) || sums_wait(shape.dtype, rows, plan.row_stride);
}
inline bool writes_rows_together(const BatchNormShape& shape) { return !streams(shape); }

// Two sums a channel in double, for one chunk or for all of them.
struct alignas(64) Sums {
  double first[kMaxWidth], second[kMaxWidth];
};

// Calls body(first, count) over blocks of channels, for work on `rows` values of each.
template <class Body>
inline void for_each_channel_block(int64_t C, int64_t rows, const Parallel& par, Body&& body) {
  constexpr int64_t kBlockChannels = 128;
  const int64_t blocks = (C + kBlockChannels - 1) / kBlockChannels;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockChannels, left = C - first;
      body(first, left < kBlockChannels ? left : kBlockChannels);
    }
  };
  if (rows * C > kForkElements) {
    par(blocks, run);
  } else {
    run(0, blocks);
  }
}

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
  for_each_channel_block(C, plan.chunks, par, [&](int64_t c, int64_t count) {
    double* first = partial + c;
    double* second = first + C;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      pass.merge(chunk, count, first, second, first + chunk * 2 * C, second + chunk * 2 * C);
    }
    pass.finish(c, count, first, second);
  });
  if (apply) return apply_only(geometry, par, pass);
  return nullptr;
}

// ------------------------------------------------------------------------------- ghost batches

template <class P>
inline void advance(P*& p, int64_t bytes) {
  if (p != nullptr) p = reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(p) + bytes);
}
inline void advance_tensors(BatchNormForward& args, int64_t bytes) {
  advance(args.x, bytes);
  advance(args.residual, bytes);
  advance(args.y, bytes);
}
inline void advance_tensors(BatchNormBackward& args, int64_t bytes) {
  advance(args.x, bytes);
  advance(args.residual, bytes);
  advance(args.dy, bytes);
  advance(args.dx, bytes);
  advance(args.dresidual, bytes);
}

// The arguments for the samples of ghost batch k alone.
template <class Args>
inline Args of_ghost(const Args& args, int64_t k) {
  Args part = args;
  BatchNormShape& shape = part.shape;
  shape.N = args.shape.first_sample(k);
  advance_tensors(part, shape.numel() * size_of(shape.dtype));
  advance(part.mask, shape.mask_bytes());
  shape.N = args.shape.first_sample(k + 1) - shape.N;
  shape.ghost = 0;
  return part;
}

// Calls run(arguments of ghost batch k, k, par). Ghost batches that fit in a cache go to one thread
// each, where there are enough of them; which thread runs what changes no result.
template <class Args, class Run>
inline const char* for_each_ghost(const Args& args, const Parallel& par, Run&& run) {
  constexpr int64_t kCacheElements = int64_t{1} << 18;
  const int64_t ghosts = args.shape.ghosts();
  if (ghosts < 2 * par.threads || args.shape.numel() / ghosts > kCacheElements) {
    for (int64_t k = 0; k < ghosts; ++k) {
      if (const char* error = run(of_ghost(args, k), k, par)) return error;
    }
    return nullptr;
  }
  std::atomic<const char*> error{nullptr};
  par(ghosts, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (const char* message = run(of_ghost(args, k), k, Parallel{})) error = message;
    }
  });
  return error;
}
