// Host calls that take a kernel, with the signatures of cuda_runtime.h's templates.
#pragma once
#include <cuda_runtime_api.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "ptx_machine.h"
#include "scheduler.h"

namespace cuda_emulator {

// Checks the launch and puts it in its stream. What a program may try and handle comes back as an
// error code; what can only be a mistake is thrown as an Error.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> body);

template <class Function>
const void* address_of(Function* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace cuda_emulator

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  // The arguments are copied now: the grid may run later.
  std::tuple<std::remove_cv_t<Params>...> copies(std::forward<Args>(args)...);
  const void* const address = cuda_emulator::address_of(kernel);
  const auto* const code = cuda_emulator::ptx::code_of(address);
  return cuda_emulator::launch(*config, address, [kernel, copies, code] {
    if (code == nullptr) {
      std::apply(kernel, copies);
      return;
    }
    const auto in_ptx = [&](const auto&... params) {
      const void* const places[] = {&params..., nullptr};
      const size_t sizes[] = {sizeof params..., 0};
      cuda_emulator::ptx::run(*code, places, sizes, sizeof...(params));
    };
    std::apply(in_ptx, copies);
  });
}

template <class Function>
std::enable_if_t<std::is_function_v<Function>, cudaError_t> cudaFuncSetAttribute(
    Function* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(cuda_emulator::address_of(kernel), attribute, value);
}

template <class Function>
std::enable_if_t<std::is_function_v<Function>, cudaError_t> cudaFuncGetAttributes(
    cudaFuncAttributes* attributes, Function* kernel) {
  return cudaFuncGetAttributes(attributes, cuda_emulator::address_of(kernel));
}

template <class Function>
std::enable_if_t<std::is_function_v<Function>, cudaError_t>
cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* kernel, int threads,
                                              size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, cuda_emulator::address_of(kernel),
                                                       threads, dynamic_shared);
}

template <class Function>
std::enable_if_t<std::is_function_v<Function>, cudaError_t> cudaOccupancyMaxActiveClusters(
    int* clusters, Function* kernel, const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(clusters, cuda_emulator::address_of(kernel), config);
}
