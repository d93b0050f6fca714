// The table of the optimizers' tensors, and the sum of their squared gradients for a clip over more
// tensors than those of one step.
#include <algorithm>
#include <cstring>

#include "kernels/cuda/grad_squares.cuh"
#include "kernels/optimizer_factors.h"

namespace batchops {
namespace cuda::optimizer {
namespace {

__global__ void __launch_bounds__(kThreads)
    optimizer_grad_squares(const __grid_constant__ Table table,
                           const __grid_constant__ GradSquares squares) {
  squares.add_up(table);
}

__global__ void __launch_bounds__(kThreads)
    optimizer_grad_total(const __grid_constant__ GradSquares squares, double* sum_sq) {
  const double total = squares.total();
  if (threadIdx.x == 0) *sum_sq = total;
}

}  // namespace
}  // namespace cuda::optimizer

using namespace cuda::optimizer;

size_t optimizer_table_bytes_cuda(const OptimizerTensor* tensors, int64_t tensor_count) {
  return Table(tensors, tensor_count, nullptr).bytes();
}

void optimizer_write_table_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                                int32_t group_count, void* table) {
  const auto aligned = [](const void* pointer, DType dtype) {
    return cuda::is_aligned(pointer, kWidth * static_cast<int>(size_of(dtype)));
  };
  struct Nothing {};
  std::vector<Nothing> sets;
  const std::vector<int32_t> set_of = optimizer_sets(
      tensors, tensor_count, group_count, sets, [](const OptimizerTensor&) { return Nothing{}; });
  auto* bytes = static_cast<unsigned char*>(table);
  const Table shape(tensors, tensor_count, table);
  auto* chunks = reinterpret_cast<int32_t*>(bytes + tensor_count * sizeof(Entry));
  int32_t* smalls = chunks + shape.chunks;
  int32_t chunk = 0;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const OptimizerTensor& x = tensors[i];
    const bool wide = aligned(x.p, x.p_dtype) && aligned(x.g, x.g_dtype) &&
                      aligned(x.m, DType::f32) && aligned(x.v, DType::f32) &&
                      aligned(x.master, DType::f32);
    const Entry entry{x.p,
                      x.g,
                      x.m,
                      x.v,
                      x.master,
                      x.device_step,
                      x.numel,
                      chunk,
                      set_of[i],
                      static_cast<int16_t>(x.p_dtype),
                      static_cast<int16_t>(x.g_dtype),
                      wide};
    std::memcpy(bytes + i * sizeof entry, &entry, sizeof entry);
    const auto tensor = static_cast<int32_t>(i);
    if (x.numel <= kSmall) {
      *smalls++ = tensor;
    } else {
      const auto count = static_cast<int32_t>((x.numel + kChunk - 1) / kChunk);
      std::fill_n(chunks + chunk, count, tensor);
      chunk += count;
    }
  }
}

size_t grad_sum_sq_workspace_bytes_cuda(const OptimizerTensor* tensors, int64_t tensor_count) {
  return GradSquares(Table(tensors, tensor_count, nullptr)).pieces * sizeof(double);
}

const char* grad_sum_sq_cuda(const OptimizerTensor* tensors, int64_t tensor_count,
                             const void* table, void* workspace, double* sum_sq, int device,
                             void* stream) {
  constexpr const char* kOp = "grad_sum_sq";
  if (const char* error = cuda::set_device(kOp, device)) return error;
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
