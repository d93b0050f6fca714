// A fiber: a function with a stack of its own that can stop in the middle and go on later. One
// fiber plays one CUDA thread. Fibers hand over to each other directly; Fiber::main() stands for
// the code that runs on the host thread's own stack. All belong to one host thread.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_emulator {

class Fiber {
 public:
  // Runs the fiber's work; returns the fiber that goes on when it is done. Must not throw.
  using Body = Fiber& (*)(void* context);

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  static Fiber& main();

  // Makes the next switch_to(*this) call body(context) from its start; whatever ran before is
  // abandoned.
  void start(Body body, void* context);
  // Stops here, where this fiber is the running one, and goes on in `next`. Comes back when
  // somebody switches to this one. With `last` nobody will.
  void switch_to(Fiber& next, bool last = false);

  // Whether `address` is in the unmapped page below this fiber's stack.
  bool overflowed_at(const void* address) const;

  static constexpr size_t kStackBytes = 64 * 1024;

 private:
  struct Machine;  // the processor's part, see fiber.cpp
  static void enter(Fiber* fiber);
  void arrived(void* fake_stack);

  Machine* machine_ = nullptr;
  Body body_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace cuda_emulator
