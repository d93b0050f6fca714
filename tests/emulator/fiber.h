// A fiber: a function with a stack of its own that can stop in the middle and go on later. One
// fiber plays one CUDA thread. Fibers of a host thread switch only to and from its main context.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_emulator {

class Fiber {
 public:
  using Body = void (*)(void* context);

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call body(context) from its start; whatever ran before is abandoned.
  // `body` must not let an exception out.
  void start(Body body, void* context);
  // Runs the fiber until it suspends or its body returns. True when the body has returned.
  bool resume();
  // Called on the fiber: goes back to its resume().
  void suspend();

  static constexpr size_t kStackBytes = 64 * 1024;

 private:
  struct Machine;  // the processor's part, see fiber.cpp
  static void enter(Fiber* fiber);
  void switch_out(bool last);

  Machine* machine_ = nullptr;
  Body body_ = nullptr;
  void* context_ = nullptr;
  bool done_ = true;
};

}  // namespace cuda_emulator
