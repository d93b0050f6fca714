#include "trap.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <unistd.h>

// Of libasan, for debuggers: address = (shadow - offset) << scale.
extern "C" void __asan_get_shadow_mapping(size_t* scale, size_t* offset);
#endif

namespace cuda_emulator {

volatile bool InRuntime::inside = false;
volatile bool InRuntime::overdue = false;
volatile bool InRuntime::told_of_volatile = false;

namespace {

// Of the process's own time. Two of them in one turn of one thread, and the thread gives way.
constexpr int kTickMicroseconds = 20'000;

struct sigaction faults_before[2], ticks_before;
itimerval timer_before;
stack_t stack_before;
uint64_t turn_at_last_tick = 0;

const void* interrupted_at(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(
      static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
  static_cast<void>(context);
  return nullptr;
#endif
}

#if defined(__SANITIZE_ADDRESS__)
// An access to memory far from any faults where ASan looks whether it is allowed.
const void* meant_by(const void* address) {
  constexpr uintptr_t kUserSpace = uintptr_t{1} << 47;
  size_t scale = 0, offset = 0;
  __asan_get_shadow_mapping(&scale, &offset);
  const auto shadow = reinterpret_cast<uintptr_t>(address) - offset;
  if (shadow >= kUserSpace >> scale) return address;
  return reinterpret_cast<const void*>(shadow << scale);
}

// ASan's own reports know lines and no CUDA threads.
void say_who_runs(const char*) {
  if (!in_kernel()) return;
  char text[512];
  const int length = describe_running(text, sizeof text);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) return;
}
#else
const void* meant_by(const void* address) { return address; }
#endif

void on_fault(int number, siginfo_t* info, void* context) {
  if (!in_kernel()) {  // not ours: the handler of before finds the same fault again
    sigaction(number, &faults_before[number == SIGBUS], nullptr);
    return;
  }
  fail_from_signal(meant_by(info->si_addr), interrupted_at(context));
}

void on_tick(int, siginfo_t*, void* context) {
  const bool same_turn = turns() == turn_at_last_tick;
  turn_at_last_tick = turns();
  if (!same_turn || !in_kernel()) return;
  const bool can_wait = InRuntime::told_of_volatile && !InRuntime::overdue;
  if (InRuntime::inside || can_wait) {
    InRuntime::overdue = true;
  } else {
    give_way_by_force(interrupted_at(context));
  }
}

}  // namespace

Traps::Traps() {
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  action.sa_sigaction = &on_tick;
  sigaction(SIGVTALRM, &action, &ticks_before);
  turn_at_last_tick = ~uint64_t{0};
  const itimerval timer{{0, kTickMicroseconds}, {0, kTickMicroseconds}};
  setitimer(ITIMER_VIRTUAL, &timer, &timer_before);
  // On a stack of its own: the fiber's may be what has run out.
  static char stack[64 * 1024];
  stack_t here{};
  here.ss_sp = stack;
  here.ss_size = sizeof stack;
  sigaltstack(&here, &stack_before);
  action.sa_flags |= SA_ONSTACK;
  action.sa_sigaction = &on_fault;
  sigaction(SIGSEGV, &action, &faults_before[0]);
  sigaction(SIGBUS, &action, &faults_before[1]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_error_report_callback(&say_who_runs);
#endif
}

Traps::~Traps() {
  setitimer(ITIMER_VIRTUAL, &timer_before, nullptr);
  sigaction(SIGVTALRM, &ticks_before, nullptr);
  sigaction(SIGSEGV, &faults_before[0], nullptr);
  sigaction(SIGBUS, &faults_before[1], nullptr);
  sigaltstack(&stack_before, nullptr);
}

std::string source_of(const void* code) {
  Dl_info info{};
  if (code == nullptr || dladdr(code, &info) == 0) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%zx",
                static_cast<size_t>(static_cast<const char*>(code) -
                                    static_cast<const char*>(info.dli_fbase)));
  const std::string place = std::string(info.dli_fname) + "+" + offset;
  const std::string command =
      "addr2line -e '" + std::string(info.dli_fname) + "' " + offset + " 2>/dev/null";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return place;
  char line[1024] = "";
  const bool found = std::fgets(line, sizeof line, pipe) != nullptr;
  pclose(pipe);
  if (!found || line[0] == '?') return place;
  line[std::strcspn(line, " \n")] = '\0';
  return line;
}

}  // namespace cuda_emulator
