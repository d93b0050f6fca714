// Streams as an order: work of one stream runs in the order of its issue, an event orders one
// stream after another, and so does the host by waiting. The legacy default stream orders itself
// with all blocking streams: its work comes after all that was issued to them, and what is issued
// to them later comes after it. Nothing else orders anything: under the reverse and the random
// schedule work waits until somebody synchronises, and independent streams then take their turns
// latest first, or at random. Each piece of work runs to its end before the next.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <string>

#include "work_order.h"

namespace cuda_emulator {

// `call` is the host's, for its refusal.
cudaError_t submit(const std::string& call, cudaStream_t stream, std::function<void()> work);
// Runs all that has been issued.
void synchronize();
// Forgets all that has been issued, after an Error.
void forget_work();
// Of the work that runs, or ran last.
const WorkOrder& running_work();

}  // namespace cuda_emulator
