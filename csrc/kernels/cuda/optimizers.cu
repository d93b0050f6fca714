// The table of the optimizers' tensors, and the sum of their squared gradients for a clip over more
// tensors than those of one step.
#include <algorithm>
#include <cstring>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/grad_squares.cuh"
#include "kernels/optimizer_factors.h"

namespace batchops {
namespace cuda::optimizer {
inline namespace optimizers_cu {

__global__ void __launch_bounds__(kThreads)
    optimizer_grad_squares(const __grid_constant__ Table table,
                           const __grid_constant__ GradSquares squares) {
  BATCHOPS_SHARED(by_warp, double[kWarps]);
  squares.add_up<kThreads>(table, by_warp);
}

__global__ void __launch_bounds__(kThreads)
    optimizer_grad_total(const __grid_constant__ GradSquares squares, double* sum_sq) {
  BATCHOPS_SHARED(by_warp, double[kWarps]);
  const double total = squares.total<kThreads>(by_warp);
  if (threadIdx.x == 0) *sum_sq = total;
}

// As many entries as a launch's arguments have room for.
constexpr int kSent = 52;
struct EntriesToSend {
  Row* to;
  int32_t count;
  Row entries[kSent];
};
static_assert(sizeof(EntriesToSend) <= 4096);

__global__ void __launch_bounds__(kThreads)
    optimizer_send_entries(const __grid_constant__ EntriesToSend args) {
  const auto i = static_cast<int32_t>(threadIdx.x);
  if (i < args.count) args.to[i] = args.entries[i];
}

// Table::tensor_of, a block a tensor.
__global__ void __launch_bounds__(kThreads)
    optimizer_index(const __grid_constant__ Table table, int32_t* tensor_of) {
  const auto tensor = static_cast<int32_t>(blockIdx.x);
  const Entry& x = table.entries[tensor];
  const bool small = x.numel <= kSmall;
  const int32_t first = small ? table.chunks + x.first_chunk : x.first_chunk;
  const int32_t count = small ? 1 : x.chunks();
  for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    tensor_of[first + i] = tensor;
  }
}

}  // namespace optimizers_cu
}  // namespace cuda::optimizer

using namespace cuda::optimizer;

size_t optimizer_table_bytes_cuda(const OptimizerTensor* tensors, int64_t tensor_count) {
  return Table(tensors, tensor_count, nullptr).bytes();
}

size_t optimizer_entries_bytes_cuda(int64_t tensor_count) { return tensor_count * sizeof(Row); }

void optimizer_describe_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                             int32_t group_count, void* entries) {
  const auto aligned = [](const void* pointer, DType dtype) {
    return cuda::is_aligned(pointer, kWidth * static_cast<int>(size_of(dtype)));
  };
  struct Nothing {};
  std::vector<Nothing> sets;
  const std::vector<int32_t> set_of = optimizer_sets(
      tensors, tensor_count, group_count, sets, [](const OptimizerTensor&) { return Nothing{}; });
  // Where the next one's chunks begin: of large tensors, and of others.
  struct Next {
    int32_t chunk = 0, rank = 0;
  } large, other;
  for (int64_t i = 0; i < tensor_count; ++i) {
    if (tensors[i].numel <= kLarge) continue;
    other.chunk += chunks_of(tensors[i].numel);
    ++other.rank;
  }
  int32_t smalls = 0;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const OptimizerTensor& x = tensors[i];
    const bool small = x.numel <= kSmall;
    Next& next = x.numel > kLarge ? large : other;
    const bool wide = aligned(x.p, x.p_dtype) && aligned(x.g, x.g_dtype) &&
                      aligned(x.m, DType::f32) && aligned(x.v, DType::f32) &&
                      aligned(x.master, DType::f32);
    const Row row{{x.p, x.g, x.m, x.v, x.master, x.numel, small ? smalls++ : next.chunk, set_of[i],
                   static_cast<int8_t>(x.p_dtype), static_cast<int8_t>(x.g_dtype), wide, next.rank},
                  x.device_step};
    std::memcpy(static_cast<unsigned char*>(entries) + i * sizeof row, &row, sizeof row);
    if (small) continue;
    next.chunk += chunks_of(x.numel);
    ++next.rank;
  }
}

const char* optimizer_send_table_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                                      const void* entries, void* table, int device, void* stream) {
  if (const char* error = cuda::use_device("optimizer table", device)) return error;
  if (tensor_count == 0) return nullptr;
  EntriesToSend some{};
  for (int64_t first = 0; first < tensor_count; first += kSent) {
    some.to = static_cast<Row*>(table) + first;
    some.count = static_cast<int32_t>(std::min<int64_t>(kSent, tensor_count - first));
    std::memcpy(some.entries, static_cast<const Row*>(entries) + first, some.count * sizeof(Row));
    if (const char* error = cuda::launch("optimizer_send_entries", optimizer_send_entries, 1,
                                         kThreads, 0, stream, some)) {
      return error;
    }
  }
  const Table shape(tensors, tensor_count, table);
  return cuda::launch("optimizer_index", optimizer_index, tensor_count, kThreads, 0, stream, shape,
                      const_cast<int32_t*>(shape.tensor_of));
}

size_t grad_sum_sq_workspace_bytes_cuda(const OptimizerTensor* tensors, int64_t tensor_count) {
  return GradSquares(Table(tensors, tensor_count, nullptr)).pieces * sizeof(double);
}

const char* grad_sum_sq_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                             const void* table, void* workspace, double* sum_sq, int device,
                             void* stream) {
  constexpr const char* kOp = "grad_sum_sq";
  if (const char* error = cuda::use_device(kOp, device)) return error;
  const Table shape(tensors, tensor_count, table);
  const GradSquares squares(shape, static_cast<double*>(workspace));
  if (squares.pieces > 0) {
    if (const char* error = cuda::launch("optimizer_grad_squares", optimizer_grad_squares,
                                         squares.pieces, kThreads, 0, stream, shape, squares)) {
      return error;
    }
  }
  return cuda::launch("optimizer_grad_total", optimizer_grad_total, 1, kThreads, 0, stream, squares,
                      sum_sq);
}

}  // namespace batchops
