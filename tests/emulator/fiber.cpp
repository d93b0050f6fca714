#include "fiber.h"

#include <pthread.h>
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
  size_t stack_bytes = 0;
  // Stacks begin at different places in their pages, or their first lines would all fall into the
  // same few sets of the cache.
  size_t offset = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif

  explicit Machine(bool own_stack) {
    if (!own_stack) return;
    mapping = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, kGuardBytes, PROT_NONE);
    stack = mapping + kGuardBytes;
    stack_bytes = kStackBytes;
    static size_t machines = 0;
    offset = machines++ % 31 * 128;
  }
  ~Machine() {
    if (mapping != nullptr) munmap(mapping, kGuardBytes + kStackBytes);
  }
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

Fiber& Fiber::main() {
  static Fiber instance;
  if (instance.machine_ == nullptr) {
    instance.machine_ = new Machine(false);
#ifdef EMULATOR_ASAN
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &instance.machine_->stack_bytes);
    pthread_attr_destroy(&attributes);
    instance.machine_->stack = static_cast<char*>(bottom);
#endif
  }
  return instance;
}

void Fiber::arrived([[maybe_unused]] void* fake_stack) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::enter(Fiber* fiber) {
  fiber->arrived(nullptr);
  Fiber& next = fiber->body_(fiber->context_);
  fiber->switch_to(next, true);
  std::abort();  // nobody switches to a finished fiber
}

void Fiber::start(Body body, void* context) {
  if (machine_ == nullptr) machine_ = new Machine(true);
  body_ = body;
  context_ = context;
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(machine_->stack, kStackBytes);  // frames of an abandoned run
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(machine_->stack + kStackBytes - machine_->offset);
  *--top = nullptr;  // begin_fiber finds the stack on a 16-byte boundary, as a call needs it,
  *--top = nullptr;  // with no return address
  *--top = reinterpret_cast<void*>(&begin_fiber);
  *--top = nullptr;                                 // rbp
  *--top = nullptr;                                 // rbx
  *--top = this;                                    // r12
  *--top = reinterpret_cast<void*>(&Fiber::enter);  // r13
  *--top = nullptr;                                 // r14
  *--top = nullptr;                                 // r15
  machine_->stack_pointer = top;
#else
  getcontext(&machine_->context);
  machine_->context.uc_stack.ss_sp = machine_->stack;
  machine_->context.uc_stack.ss_size = kStackBytes;
  machine_->context.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&machine_->context, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
    enter(reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low));
  }),
              2, static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
#endif
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool last) {
  void* fake_stack = nullptr;
#ifdef EMULATOR_ASAN
  // A null argument tells ASan that this stack is done with.
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, next.machine_->stack,
                                 next.machine_->stack_bytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&machine_->stack_pointer, next.machine_->stack_pointer);
#else
  swapcontext(&machine_->context, &next.machine_->context);
#endif
  arrived(fake_stack);
}

bool Fiber::overflowed_at(const void* address) const {
  const auto* byte = static_cast<const char*>(address);
  return machine_ != nullptr && machine_->mapping != nullptr && byte >= machine_->mapping &&
         byte < machine_->stack;
}

}  // namespace cuda_emulator
