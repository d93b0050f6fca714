// How tasks of the collator are run from Python.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "collate/thread_pool.h"
#include "python/reader.h"

namespace batchops::collate {

// Waking a thread costs more than copying less than this: the caller does it, in wait().
constexpr int64_t kBackgroundBytes = 64 << 10;

// Over before another thread would be awake, or would have taken the GIL.
inline bool is_small(const Task& task) { return task.bytes() < kBackgroundBytes; }

// Who lets go of the GIL beside a thread that computes in Python gets it back after that thread's
// switch interval, 5 ms: ten times what copying this much takes. So the GIL is kept for it.
constexpr int64_t kKeepGilBytes = 4 << 20;

template <class Run>
inline void without_gil(const Task& task, Run&& run) {
  if (task.bytes() < kKeepGilBytes) return run();
  // Not gil_scoped_release: a daemon thread that asks for the GIL while the interpreter exits is
  // ended there by unwinding its stack, and unwinding out of a destructor would abort.
  PyThreadState* const state = PyEval_SaveThread();
  run();
  PyEval_RestoreThread(state);
}

inline void wait_for(Task& task) {
  if (task.done()) return;
  without_gil(task, [&] { ThreadPool::instance().wait(task); });
}

// Done when it returns, with the help of at most `threads` pool threads. Nothing goes on meanwhile,
// so help has to be worth a wake-up, and the GIL the wait for its return: some 30 µs of copying.
//
// In the thread that trains, torch's threads help. They are idle while it is here, but not asleep:
// after an operator they look for the next one's work for some milliseconds, on the cores that the
// pool's threads would have to share with them.
inline void run_now(const std::shared_ptr<Task>& task, int threads) {
  constexpr int64_t kWorthHelp = 256 << 10;
  if (task->bytes() < kWorthHelp) return ThreadPool::instance().wait(*task);
  if (threads > 0 && team.is_mine()) {
    return without_gil(*task, [&] {
      team.run(
          threads + 1, [](void* part) { ThreadPool::take_part(*static_cast<Task*>(part)); },
          task.get());
    });
  }
  if (threads > 0) ThreadPool::instance().submit(task);
  wait_for(*task);
}

inline std::byte* output(const char* what, uintptr_t address, int64_t bytes, int64_t expected) {
  if (bytes != expected || (address == 0 && expected != 0)) {
    throw pybind11::value_error(std::string(what) + ": expected " + std::to_string(expected) +
                                " bytes, got " + std::to_string(bytes) + " at " +
                                std::to_string(address));
  }
  return reinterpret_cast<std::byte*>(address);
}

}  // namespace batchops::collate
