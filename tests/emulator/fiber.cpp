#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#endif

namespace cuda_emulator {

// The stack has an unmapped page below it: an overflow faults instead of writing elsewhere.
struct Fiber::Machine {
  static constexpr size_t kGuardBytes = 4096;
  char* mapping = nullptr;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* fiber_stack_pointer = nullptr;
  void* main_stack_pointer = nullptr;
#else
  ucontext_t fiber_context;
  ucontext_t main_context;
#endif
#ifdef EMULATOR_ASAN
  const void* main_stack_bottom = nullptr;
  size_t main_stack_bytes = 0;
#endif

  Machine() {
    mapping = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, kGuardBytes, PROT_NONE);
    stack = mapping + kGuardBytes;
  }
  ~Machine() { munmap(mapping, kGuardBytes + kStackBytes); }
};

#if defined(__x86_64__)
// Saves the registers that the System V ABI lets a callee keep, and swaps the stack pointer.
// swapcontext would also save the signal mask, by a system call: 20 times slower.
__attribute__((naked, noinline)) static void swap_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
      "ret");
}

// Where a new fiber begins: start() left the fiber in r12 and Fiber::enter in r13.
__attribute__((naked, noinline)) static void begin_fiber() {
  asm volatile(
      "mov %r12, %rdi\n"
      "call *%r13\n"
      "ud2");
}
#endif

Fiber::~Fiber() { delete machine_; }

void Fiber::enter(Fiber* fiber) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &fiber->machine_->main_stack_bottom,
                                  &fiber->machine_->main_stack_bytes);
#endif
  fiber->body_(fiber->context_);
  fiber->done_ = true;
  fiber->switch_out(true);
  std::abort();  // a finished fiber is never resumed
}

void Fiber::start(Body body, void* context) {
  if (machine_ == nullptr) machine_ = new Machine;
  body_ = body;
  context_ = context;
  done_ = false;
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(machine_->stack, kStackBytes);  // frames of an abandoned run
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(machine_->stack + kStackBytes);
  *--top = nullptr;  // begin_fiber finds the stack on a 16-byte boundary, as a call needs it,
  *--top = nullptr;  // with no return address
  *--top = reinterpret_cast<void*>(&begin_fiber);
  *--top = nullptr;                                 // rbp
  *--top = nullptr;                                 // rbx
  *--top = this;                                    // r12
  *--top = reinterpret_cast<void*>(&Fiber::enter);  // r13
  *--top = nullptr;                                 // r14
  *--top = nullptr;                                 // r15
  machine_->fiber_stack_pointer = top;
#else
  getcontext(&machine_->fiber_context);
  machine_->fiber_context.uc_stack.ss_sp = machine_->stack;
  machine_->fiber_context.uc_stack.ss_size = kStackBytes;
  machine_->fiber_context.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&machine_->fiber_context,
              reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
                enter(reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low));
              }),
              2, static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
#endif
}

bool Fiber::resume() {
#ifdef EMULATOR_ASAN
  void* main_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&main_fake_stack, machine_->stack, kStackBytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&machine_->main_stack_pointer, machine_->fiber_stack_pointer);
#else
  swapcontext(&machine_->main_context, &machine_->fiber_context);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
  return done_;
}

void Fiber::suspend() { switch_out(false); }

void Fiber::switch_out(bool last) {
#ifdef EMULATOR_ASAN
  // A null argument tells ASan that this stack is done with.
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, machine_->main_stack_bottom,
                                 machine_->main_stack_bytes);
#endif
  static_cast<void>(last);
#if defined(__x86_64__)
  swap_stacks(&machine_->fiber_stack_pointer, machine_->main_stack_pointer);
#else
  swapcontext(&machine_->fiber_context, &machine_->main_context);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &machine_->main_stack_bottom,
                                  &machine_->main_stack_bytes);
#endif
}

}  // namespace cuda_emulator
