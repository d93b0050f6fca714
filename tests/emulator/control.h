// For the extern "C" entry points that Python loads: runs host code that launches emulated kernels
// and turns what it returns or throws into a code and a text.
//
//   extern "C" int emulated_lamb(const LambStep* args, char* text, size_t size) {
//     return cuda_emulator::guarded(text, size, [&] { return batchops::lamb_cuda(*args, …); });
//   }
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>

#include "host_call.h"
#include "settings.h"
#include "streams.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_emulator {

enum Outcome : int { succeeded = 0, refused = 1, failed = 2 };

// `f` returns null or a message (refused), to which is added what the emulated runtime knows of it;
// an emulator Error or other exception is `failed`. All that `f` has put in streams has run at the
// end.
template <class F>
int guarded(char* text, size_t size, F&& f) {
  try {
    forget_refusals();
    const char* message = f();
    synchronize();
    if (message == nullptr) return succeeded;
    const std::string more = refusal_behind(message);
    std::snprintf(text, size, more.empty() ? "%s" : "%s [%s]", message, more.c_str());
    return refused;
  } catch (const std::exception& error) {
    forget_work();
    std::snprintf(text, size, "%s", error.what());
    return failed;
  }
}

}  // namespace cuda_emulator
