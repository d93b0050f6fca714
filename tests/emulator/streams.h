// Streams as an order: work of one stream runs in the order of its issue, an event orders one
// stream after another, and the legacy default stream orders itself with all blocking ones. Nothing
// else does: under the reverse and the random schedule work waits until somebody synchronises, and
// independent streams then take their turns latest first, or at random. Each piece of work runs to
// its end before the next.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>

namespace cuda_emulator {

cudaError_t submit(cudaStream_t stream, std::function<void()> work);
// Runs all that has been issued.
void synchronize();
// Forgets all that has been issued, after an Error.
void forget_work();

}  // namespace cuda_emulator
