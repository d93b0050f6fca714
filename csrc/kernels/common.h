// Vocabulary shared by every kernel: dtypes, layouts, activations and the way a CPU kernel gets its
// threads. Includes no framework header, so that the kernels can be tested and reused alone.
#pragma once
#include <cstdint>
#include <type_traits>

#define BATCHOPS_API __attribute__((visibility("default")))

namespace batchops {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// channels_first: element (n, c, i) lies at (n * C + c) * HxW + i.
// channels_last:  element (n, c, i) lies at (n * HxW + i) * C + c. A 2-D (N, C) input is
//                 channels_last with HxW = 1.
enum class Layout : int32_t { channels_first = 0, channels_last = 1 };

// X(name, functor): the one list of activations. The functors live in activation.inl; dispatchers,
// name parsing and error messages are generated from here.
#define BATCHOPS_FOR_EACH_ACTIVATION(X) \
  X(none, Identity)                     \
  X(relu, Relu)                         \
  X(leaky_relu, LeakyRelu)              \
  X(silu, Silu)                         \
  X(gelu, Gelu)                         \
  X(gelu_tanh, GeluTanh)                \
  X(hardswish, Hardswish)

enum class Activation : int32_t {
#define BATCHOPS_ACTIVATION_ENUM(name, functor) name,
  BATCHOPS_FOR_EACH_ACTIVATION(BATCHOPS_ACTIVATION_ENUM)
#undef BATCHOPS_ACTIVATION_ENUM
};

// How a CPU kernel runs in parallel. The caller owns the threads (at::parallel_for in the torch
// binding, a plain loop in a test). `run(context, count, body, data)` calls body(data, begin, end)
// over a partition of [0, count) and returns when all of it is done. Kernels cut their work into
// pieces whose number depends on the shapes only, never on `threads`: so the same bits come out
// for any number of threads. `threads` serves only to choose whether to fork at all.
struct Parallel {
  using Body = void (*)(void* data, int64_t begin, int64_t end);
  void (*run)(void* context, int64_t count, Body body, void* data) = nullptr;
  void* context = nullptr;
  int threads = 1;

  template <class F>
  void operator()(int64_t count, F&& body) const {
    if (threads <= 1 || count <= 1 || run == nullptr) {
      body(int64_t{0}, count);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    run(
        context, count,
        [](void* data, int64_t begin, int64_t end) { (*static_cast<Fn*>(data))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace batchops
