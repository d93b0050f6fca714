// Signals while kernels run: a fault in device code becomes an Error, and a thread that waits by
// reading a volatile variable, with nothing in its loop that gives way, is made to.
#pragma once
#include <string>

namespace cuda_emulator {

// Handlers are in place while it lives. What AddressSanitizer finds before the access is left to
// its own report, after which stands who ran.
class Traps {
 public:
  Traps();
  ~Traps();
  Traps(const Traps&) = delete;
  Traps& operator=(const Traps&) = delete;
};

// While it lives a thread is not made to give way: it is in the emulator's own code.
class InRuntime {
 public:
  InRuntime() : before_(inside) { inside = true; }
  ~InRuntime() { inside = before_; }
  InRuntime(const InRuntime&) = delete;
  InRuntime& operator=(const InRuntime&) = delete;
  static volatile bool inside;
  // A thread was to be made to give way, but was in here: it does so when it comes out
  // (instrument.cpp).
  static volatile bool overdue;
  // Volatile accesses are told of (instrument.cpp), and a thread gives way before the next one.
  // Between the telling and the access it must not: what it reads would be newer than recorded.
  static volatile bool told_of_volatile;

 private:
  bool before_;
};

// "file:line" of an instruction by addr2line, else "library+offset".
std::string source_of(const void* code);

}  // namespace cuda_emulator
