// What this build and this machine can do.
#pragma once
#include "kernels/common.h"

namespace batchops {

BATCHOPS_API bool built_with_cuda();
// Comma-separated machine-code targets of the CUDA build ("sm_90,sm_120"), "" without CUDA.
BATCHOPS_API const char* cuda_targets();
// The toolkit as major * 1000 + minor * 10 (13000 is 13.0), 0 without CUDA.
BATCHOPS_API int cuda_toolkit_version();
// The highest CUDA version the installed driver supports, in the same form; 0 when there is none.
BATCHOPS_API int cuda_driver_version();
// Devices the statically linked runtime sees; 0 with `message` set when it cannot be used, the
// text saying what is needed (a CUDA 13 runtime wants driver 580 or newer).
BATCHOPS_API int cuda_device_count(const char** message);
// Null where this build's kernels run on the device, which becomes current; else why they do not.
BATCHOPS_API const char* cuda_problem(int device);
// "avx512", "avx2" or "default": chosen once, BATCHOPS_CPU_CAPABILITY lowers it.
BATCHOPS_API const char* cpu_capability();

// Locks pages for copies to any device, and unlocks them; `device` becomes current. False where
// that fails, with nothing left behind.
BATCHOPS_API bool cuda_lock_pages(void* data, size_t bytes, int device);
BATCHOPS_API bool cuda_unlock_pages(void* data, int device);

// Whether what is put in the stream goes to a graph rather than to the device.
BATCHOPS_API bool cuda_stream_captures(void* stream);

}  // namespace batchops
