// Forward: y = activation(z), after the statistics.

template <class S, class Act, bool kMask>
struct GroupForward : GroupStatistics<S> {
  using Base = GroupStatistics<S>;
  using Element = S;
  using T = typename Base::T;
  using V = typename Base::V;
  using Base::args, Base::plan, Base::shape, Base::rows, Base::x, Base::stats, Base::L;

  const AffineValues<T>& affine;
  const Act act;
  const S* const residual = static_cast<const S*>(args.residual);
  S* const y = static_cast<S*>(args.y);
  const bool past_cache = streams(args.shape);

  // What a loop over elements needs, to be kept in registers: as far as the compiler knows, a store
  // to y may alter any member of what lies in memory.
  struct Elements {
    const S* x;
    const S* residual;
    S* y;
    Act act;

    template <class Lanes, class Mean, class Value>
    BATCHOPS_INLINE auto apply(int64_t at, Lanes lanes, bool past, Mean mean, Value scale,
                               Value shift) const {
      const auto value = load<T>(x + at, lanes);
      using X = std::remove_cvref_t<decltype(value)>;
      X z = normalize(value, X(mean), X(scale), X(shift));
      if (residual != nullptr) z = z + load<T>(residual + at, lanes);
      put(y + at, activation(act, z), lanes, past);
      return z;
    }
  };
  Elements elements() const { return {x, residual, y, act}; }

  // One stretch of n elements from `offset`, with its mask bits from `mask`.
  template <class Affine>
  BATCHOPS_INLINE void apply_run(int64_t offset, int64_t n, uint8_t* mask, const Affine of) const {
    const Elements at = elements();
    bool past = past_cache;
    int64_t start = 0;
    uint64_t bits = 0;
    const auto vector = [&](int64_t j, auto lanes, int) BATCHOPS_INLINE_LAMBDA {
      // The memory would idle while this loop runs in the cache.
      if constexpr (Affine::kPrefetches) {
        prefetch_pair<T>(at.x, offset + n + j);
      } else {
        prefetch_ahead<T>(at.x, offset + j, lanes);
      }
      return at.apply(offset + j, lanes, past, of.mean(j, lanes), of.scale(j, lanes),
                      of.shift(j, lanes));
    };
    if (past && !can_stream<T>(y + offset)) {
      if (kMask || !Affine::kAnywhere) {
        past = false;  // mask bytes and pairs begin at the run's first element
      } else {
        const int64_t head = to_boundary<T>(y + offset);
        start = head < n ? head : n;
        vector(0, First{start}, 0);
      }
    }
    if constexpr (!kMask) return for_pairs<T>(start, n, vector);
    for_blocks<T>(
        0, n, [&](int64_t, auto) BATCHOPS_INLINE_LAMBDA { bits = 0; },
        [&](int64_t j, auto lanes, int u)
            BATCHOPS_INLINE_LAMBDA { bits |= mask_bits(vector(j, lanes, u)) << (u * L); },
        [&](int64_t j, auto bytes) BATCHOPS_INLINE_LAMBDA {
          // Lanes past the end of a run must leave no bits.
          if (n - j < 64) bits &= (uint64_t{1} << (n - j)) - 1;
          write_bits(mask + j / 8, bits, bytes);
        });
  }
  BATCHOPS_INLINE uint64_t mask_bits(V z) const {
    if constexpr (kMask) {
      constexpr uint64_t kAll = L == 64 ? ~uint64_t{0} : (uint64_t{1} << L) - 1;
      return positive_bits(act.mask_source(z)) & kAll;
    }
    return 0;
  }

  void apply_planes(int64_t unit, int64_t chunk) const {
    const int64_t HxW = shape.HxW, base = unit * plan.M;
    const int64_t begin = begin_of_chunk(plan, HxW, chunk);
    const int64_t end = begin_of_chunk(plan, HxW, chunk + 1);
    const int64_t first_channel = unit % shape.G * plan.D;
    const GroupStats<T> of(stats, shape.N * shape.G, unit);
    struct Values {
      V first, second;
    };
    const auto enter = [&](int64_t d) BATCHOPS_INLINE_LAMBDA {
      const T scale = of.scale(affine.weight[first_channel + d]);
      return Values{V(scale), V(of.shift(scale, affine.bias[first_channel + d]))};
    };
    const V mean(of.hi);
    if constexpr (kMask) {
      for (int64_t j = begin; j < end;) {
        const int64_t d = j / HxW, i = j % HxW;
        const int64_t n = end - j < HxW - i ? end - j : HxW - i;
        uint8_t* mask = args.mask + ((base + j) / HxW) * ((HxW + 7) / 8) + i / 8;
        const Values values = enter(d);
        apply_run(base + j, n, mask, PlaneAffine<T>{mean, values.first, values.second});
        j += n;
      }
    } else {
      const Elements at = elements();
      const bool past = past_cache;
      const int64_t M = plan.M;
      const bool asks = asks_for_next_group(plan);
      for_planes_in_order<T>(begin, end, HxW, y + base, enter,
                             [&](int64_t j, auto lanes, V scale, V shift) BATCHOPS_INLINE_LAMBDA {
                               if (asks) prefetch_pair<T>(at.x, base + M + j);
                               at.apply(base + j, lanes, past, mean, scale, shift);
                             });
    }
  }

  // `flat` is scratch for the bits of a row, where its runs are padded.
  template <class Affine>
  void apply_row(int64_t n, int64_t step, const Affine& of, uint8_t* flat) const {
    const int64_t width = rows.row_width(step);
    uint8_t* const mask = kMask ? args.mask + rows.mask_offset(n, step) : nullptr;
    const bool joined = kMask && rows.joined(width);
    apply_run(rows.row_offset(n, step), width, joined ? flat : mask, of);
    if (joined) pad_runs(mask, flat, rows.runs(width), rows.run());
  }

  void apply_pixels(int64_t n, int64_t chunk_begin, int64_t chunk_end,
                    const ScratchRows<T>& columns, uint8_t* flat) const {
    column_affine(rows, stats, n, affine, columns[0], columns[1], columns[2]);
    if constexpr (!kMask) {
      for (int row = 0; row < 3; ++row) in_pair_order<S>(columns[row], plan.width);
    }
    const ColumnAffine<S> of{columns[0], columns[1], columns[2]};
    // The chunks from the last on: it is the one still in the cache.
    for (int64_t chunk = chunk_end; chunk-- > chunk_begin;) {
      const int64_t end = rows.end_step(chunk);
      for (int64_t step = rows.first_step(chunk); step < end; ++step) apply_row(n, step, of, flat);
    }
  }
};

template <class Pass>
inline const char* forward_planes(const Pass& pass, const Parallel& par) {
  const GroupNormPlan& plan = pass.plan;
  const auto apply = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pass.apply_planes(i / plan.chunks, i % plan.chunks);
    fence();
  };
  if (pass.args.have_stats) {
    par(plan.units * plan.chunks, apply);
    return nullptr;
  }
  if (takes_whole_units(plan, par)) {
    par(plan.units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        double mean, m2;
        pass.of_planes(unit, 0, mean, m2);
        for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
          double chunk_mean, chunk_m2;
          pass.of_planes(unit, chunk, chunk_mean, chunk_m2);
          pass.merge(chunk, mean, m2, chunk_mean, chunk_m2);
        }
        pass.finish(unit, mean, m2);
        for (int64_t chunk = plan.chunks; chunk-- > 0;) pass.apply_planes(unit, chunk);
      }
      fence();
    });
    return nullptr;
  }
  Scratch<double> partial;
  if (!partial.allocate(2 * plan.units * plan.chunks)) return kOutOfMemory;
  double* const at = partial.get();
  par(plan.units * plan.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pass.of_planes(i / plan.chunks, i % plan.chunks, at[2 * i], at[2 * i + 1]);
    }
  });
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    double* first = at + 2 * unit * plan.chunks;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      pass.merge(chunk, first[0], first[1], first[2 * chunk], first[2 * chunk + 1]);
    }
    pass.finish(unit, first[0], first[1]);
  }
  par(plan.units * plan.chunks, apply);
  return nullptr;
}

// What one thread needs for rows and pixels.
template <class T>
struct ForwardScratch {
  ScratchRows<T> columns;
  Scratch<uint8_t> flat;
  Scratch<double> sums;

  bool allocate(const GroupNormPlan& plan, int64_t G, bool mask) {
    return columns.allocate(3, plan.width) && (!mask || flat.allocate(plan.width / 8 + 16)) &&
           sums.allocate(6 * G);
  }
};

template <class Pass>
inline const char* forward_rows(const Pass& pass, const Parallel& par) {
  using S = typename Pass::Element;
  using T = typename Pass::T;
  const GroupNormShape& shape = pass.shape;
  std::atomic<bool> failed{false};
  par(shape.N, [&](int64_t begin, int64_t end) {
    ForwardScratch<T> scratch;
    const bool spread = shape.G > 1, mask = pass.args.mask != nullptr;
    if ((spread || mask) && !scratch.allocate(pass.plan, shape.G, mask)) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < shape.G && !pass.args.have_stats; ++g) {
        double mean, m2;
        pass.of_stretch(pass.x + pass.rows.row_offset(n, 0) + g * pass.plan.M, pass.plan.M, mean,
                        m2);
        pass.finish(n * shape.G + g, mean, m2);
      }
      if (spread) {
        pass.apply_pixels(n, 0, 1, scratch.columns, scratch.flat.get());
      } else {
        const GroupStats<T> of(pass.stats, shape.N, n);
        const RowAffine<S> affine(of, pass.affine.weight, pass.affine.bias);
        pass.apply_row(n, 0, affine, scratch.flat.get());
      }
    }
    fence();
  });
  return failed ? kOutOfMemory : nullptr;
}

template <class Pass>
inline const char* forward_pixels(const Pass& pass, const Parallel& par) {
  using T = typename Pass::T;
  const GroupNormShape& shape = pass.shape;
  const GroupNormPlan& plan = pass.plan;
  const int64_t G = shape.G;
  const bool mask = pass.args.mask != nullptr;
  std::atomic<bool> failed{false};
  const auto with_scratch = [&](auto&& f) {
    ForwardScratch<T> scratch;
    if (!scratch.allocate(plan, G, mask)) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    f(scratch);
  };
  const auto merge = [&](int64_t chunk, double* total, const double* part) {
    for (int64_t g = 0; g < G; ++g) pass.merge(chunk, total[g], total[G + g], part[g], part[G + g]);
  };
  const auto finish = [&](int64_t n, const double* total) {
    for (int64_t g = 0; g < G; ++g) pass.finish(n * G + g, total[g], total[G + g]);
  };
  const auto apply = [&](int64_t begin, int64_t end) {
    with_scratch([&](ForwardScratch<T>& scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i % plan.chunks;
        pass.apply_pixels(i / plan.chunks, chunk, chunk + 1, scratch.columns, scratch.flat.get());
      }
      fence();
    });
  };
  if (pass.args.have_stats) {
    par(shape.N * plan.chunks, apply);
    return failed ? kOutOfMemory : nullptr;
  }
  if (takes_whole_units(plan, par)) {
    par(shape.N, [&](int64_t begin, int64_t end) {
      with_scratch([&](ForwardScratch<T>& scratch) {
        double* const sums = scratch.sums.get();
        double* const total = sums + 2 * G;
        double* const part = sums + 4 * G;
        for (int64_t n = begin; n < end; ++n) {
          pass.of_pixels(n, 0, scratch.columns, sums, total, total + G);
          for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
            pass.of_pixels(n, chunk, scratch.columns, sums, part, part + G);
            merge(chunk, total, part);
          }
          finish(n, total);
          pass.apply_pixels(n, 0, plan.chunks, scratch.columns, scratch.flat.get());
        }
        fence();
      });
    });
    return failed ? kOutOfMemory : nullptr;
  }
  Scratch<double> partial;  // [n][chunk][2][G]
  if (!partial.allocate(shape.N * plan.chunks * 2 * G)) return kOutOfMemory;
  double* const at = partial.get();
  par(shape.N * plan.chunks, [&](int64_t begin, int64_t end) {
    with_scratch([&](ForwardScratch<T>& scratch) {
      for (int64_t i = begin; i < end; ++i) {
        double* to = at + i * 2 * G;
        pass.of_pixels(i / plan.chunks, i % plan.chunks, scratch.columns, scratch.sums.get(), to,
                       to + G);
      }
    });
  });
  if (failed) return kOutOfMemory;
  for (int64_t n = 0; n < shape.N; ++n) {
    double* total = at + n * plan.chunks * 2 * G;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      merge(chunk, total, total + chunk * 2 * G);
    }
    finish(n, total);
  }
  par(shape.N * plan.chunks, apply);
  return failed ? kOutOfMemory : nullptr;
}

const char* group_norm_forward(const GroupNormForward& args, const Parallel& par) {
  const GroupNormShape& shape = args.shape;
  const GroupNormPlan plan = plan_group_norm(shape);
  const Parallel serial;
  const Parallel& runner = shape.numel() < kForkElements ? serial : par;
  const char* error = nullptr;
  with_element(shape.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    AffineValues<AccOf<S>> affine;
    if (!affine.read(args, plan)) {
      error = kOutOfMemory;
      return;
    }
    const auto run = [&](const auto& pass) {
      return plan.kind == GroupNormPlan::planes ? forward_planes(pass, runner)
             : plan.kind == GroupNormPlan::rows ? forward_rows(pass, runner)
                                                : forward_pixels(pass, runner);
    };
    if (args.mask != nullptr) {
      using Act = GenericActivation;
      error = run(GroupForward<S, Act, true>{{args, plan}, affine, activation_of<Act>(shape)});
      return;
    }
    error = with_instance<S, Identity, FastSilu<sizeof(S) == 2>>(shape, [&](const auto& act) {
      using Act = std::remove_cvref_t<decltype(act)>;
      return run(GroupForward<S, Act, false>{{args, plan}, affine, act});
    });
  });
  return error;
}
