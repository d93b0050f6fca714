// Where the host code was when the emulated runtime refused a call of it. What can only be a
// mistake is thrown as an Error; what a program may try comes back as an error code, and whoever
// reports that (control.h) asks here for the rest.
#pragma once
#include <driver_types.h>

#include <string>

namespace cuda_emulator {

// "file:line" of the host code that called into the emulator; where that is the launch helper of
// the kernels (runtime.cuh), its caller's too.
std::string host_line();

// Returns `error` and remembers it, `call`, why it failed, and the place.
cudaError_t refuse_call(cudaError_t error, std::string call, std::string why);
// Of the last refused call, if `message` names its error: the call, the reason and the place.
std::string refusal_behind(const char* message);
void forget_refusals();

}  // namespace cuda_emulator
