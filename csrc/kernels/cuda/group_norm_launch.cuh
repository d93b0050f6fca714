// What the launch code of group norm's forward and backward shares: checks, and the way from
// dtypes and pointers to an instance of the kernels.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "kernels/cuda/group_norm.cuh"

namespace batchops::cuda::group {

inline const char* validate(const char* operation, const GroupNormShape& shape,
                            const uint8_t* mask) {
  if (shape.N < 0 || shape.C < 0 || shape.HxW < 0) {
    return message("%s: N, C and HxW must not be negative", operation);
  }
  if (shape.C >= int64_t{1} << 30) {
    return message("%s: expected C < 2^30, got %lld", operation, static_cast<long long>(shape.C));
  }
  if (shape.G < 1 || shape.C % shape.G != 0) {
    return message("%s: expected G that divides C, got G = %lld and C = %lld", operation,
                   static_cast<long long>(shape.G), static_cast<long long>(shape.C));
  }
  return check_mask(operation, shape.activation, mask);
}

inline Affines affines_of(const void* weight, const void* bias, DType dtype) {
  const bool wide = dtype != DType::f64 && is_aligned(weight, 16) && is_aligned(bias, 16);
  return {weight, bias, dtype, wide};
}

// Calls run(TypeIs<T>, integral_constant<Layout>, integral_constant<int, W>, activation), the
// layout being that of the walk. Units are of 16 bytes where all of `pointers` and the rows of
// pixels are aligned to that, and single elements elsewhere. There, and where `any` is set, one
// instance serves all activations.
template <class F>
const char* dispatch(const char* operation, const GroupNormShape& shape, bool mask,
                     std::initializer_list<const void*> pointers, F&& run, bool any = false) {
  const Layout walk = walks_pixels(shape, mask) ? Layout::channels_last : Layout::channels_first;
  const float slope = static_cast<float>(shape.slope);
  bool aligned = true;
  for (const void* p : pointers) aligned = aligned && is_aligned(p, 16);
  return dispatch_dtype(operation, shape.dtype, [&](auto type) {
    constexpr int W = kWidest<typename decltype(type)::type>;
    const bool wide = aligned && (walk == Layout::channels_first || shape.C % W == 0);
    return dispatch_layout(walk, [&](auto layout) -> const char* {
      if (!wide) {
        return run(type, layout, std::integral_constant<int, 1>{},
                   AnyActivation{shape.activation, slope});
      }
      constexpr std::integral_constant<int, W> width{};
      if (any) return run(type, layout, width, AnyActivation{shape.activation, slope});
      return with_activation<Identity, Silu>(
          shape.activation, slope, [&](auto act) { return run(type, layout, width, act); });
    });
  });
}

// The elementwise kernel, where groups are streamed.
template <class Arguments>
const char* apply_shape(const char* operation, const Arguments& args, int device,
                        LaunchShape& shape) {
  int64_t blocks = 0;
  const char* error = grid_size(operation, device, args.cut.pieces, blocks);
  shape = {dim3(static_cast<unsigned>(blocks), 1, 1), dim3(kBlock, 1, 1),
           static_cast<size_t>(args.shared.total)};
  return error;
}

// The cut's device where no cluster is to be had.
inline Device without_clusters(Device device) {
  device.most_cluster = 1;
  return device;
}

// f(device, refused) on what is found and, if its clusters are refused, without.
template <class F>
const char* with_fallback(const Device& found, F f) {
  bool refused = false;
  const char* error = f(found, refused);
  return refused ? f(without_clusters(found), refused) : error;
}

// f(cut) of the cut that is tried first and, if that takes clusters, of the one without.
template <class F>
void for_each_cut(const GroupNormShape& shape, const Purpose& purpose, const Device& found, F f) {
  const Cut first = make_cut(shape, purpose, 1, found);
  f(first);
  if (first.cluster()) f(make_cut(shape, purpose, 1, without_clusters(found)));
}

// The kernel that sees each part first: on clusters where the cut says so. Those may be `refused`:
// a process or a stream may have less than the device.
template <class Arguments, class Act>
const char* launch_parts(const char* operation, const char* name,
                         void (*kernel)(const Arguments, const Act), const Arguments& args,
                         const Act& act, int device, void* stream, bool& refused) {
  refused = false;
  int64_t blocks = 0;
  if (const char* error = grid_size(operation, device, args.cut.turns, blocks)) return error;
  const auto bytes = static_cast<size_t>(args.shared.total);
  if (!args.cut.cluster()) return launch(name, kernel, blocks, kBlock, bytes, stream, args, act);
  const auto parts = static_cast<unsigned>(args.cut.parts);
  const unsigned whole_clusters = static_cast<unsigned>(round_up<int64_t>(blocks, parts));
  const LaunchShape shape{dim3(whole_clusters, 1, 1), dim3(kBlock, 1, 1), bytes, parts};
  const cudaError_t error = try_launch(name, kernel, shape, stream, args, act);
  refused = lacks_room(shape, error);
  if (!refused) return check(name, "launch", error);
  static_cast<void>(cudaGetLastError());
  return nullptr;
}

}  // namespace batchops::cuda::group
