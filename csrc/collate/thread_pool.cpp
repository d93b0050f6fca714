#include "collate/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <string>
#include <system_error>

namespace batchops::collate {
namespace {

// A batch takes some 100 µs and the next one follows at once, while a futex wake costs 5 to 50 µs:
// look for work this many times (about 20 µs) before going to sleep.
constexpr int kSpins = 400;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<ThreadPool*> current{nullptr};

}  // namespace

// Never destroyed: threads of it may outlive static destruction, and a forked child must not join
// threads that exist in its parent only.
ThreadPool& ThreadPool::instance() {
  static ThreadPool* const first = create();
  (void)first;
  return *current.load(std::memory_order_acquire);
}

ThreadPool* ThreadPool::create() {
  current.store(new ThreadPool(1), std::memory_order_release);
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  return current.load(std::memory_order_acquire);
}

void ThreadPool::before_fork() { current.load()->mutex_.lock(); }

void ThreadPool::after_fork_in_parent() { current.load()->mutex_.unlock(); }

void ThreadPool::after_fork_in_child() {
  current.store(new ThreadPool(current.load()->generation_ + 1), std::memory_order_release);
}

int ThreadPool::threads() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(threads_.size());
}

void ThreadPool::start_threads(int wanted) {
  wanted = std::min(wanted, kMaxThreads);
  while (!stopped_ && static_cast<int>(threads_.size()) < wanted) {
    // Signals belong to the application's threads: Python's handlers, Ctrl-C above all.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    // A fault is the faulting thread's own: blocked, its handlers would not run.
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) {
      sigdelset(&all, fault);
    }
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      threads_.emplace_back([this] { worker(); });
    } catch (const std::system_error&) {
      started = false;  // wait() does the work instead
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return;
#if defined(__linux__)
    const std::string name = "batchops-" + std::to_string(threads_.size());
    pthread_setname_np(threads_.back().native_handle(), name.c_str());
#endif
  }
}

void ThreadPool::submit(std::shared_ptr<Task> task) {
  task->generation_ = generation_;
  if (task->chunks_ <= 0) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    start_threads(task->max_threads_);
    if (threads_.empty()) return;
    queue_.push_back(std::move(task));
    submitted_.fetch_add(1, std::memory_order_release);
  }
  work_.notify_all();
}

// With the mutex held: the oldest task that still has chunks to give and room for a thread.
std::shared_ptr<Task> ThreadPool::next_task() {
  for (auto it = queue_.begin(); it != queue_.end();) {
    Task& task = **it;
    if (task.next_.load(std::memory_order_relaxed) >= task.chunks_) {
      it = queue_.erase(it);
      continue;
    }
    if (task.workers_ < task.max_threads_) {
      ++task.workers_;
      return *it;
    }
    ++it;
  }
  return nullptr;
}

void ThreadPool::run_chunks(Task& task) {
  for (;;) {
    const int64_t chunk = task.next_.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= task.chunks_) return;
    task.run(chunk);
    task.finished_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void ThreadPool::worker() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    std::shared_ptr<Task> task = next_task();
    if (task == nullptr) {
      if (stopped_) return;
      const uint64_t seen = submitted_.load(std::memory_order_relaxed);
      lock.unlock();
      for (int i = 0; i < kSpins && submitted_.load(std::memory_order_relaxed) == seen; ++i) {
        relax();
      }
      lock.lock();
      work_.wait(lock,
                 [&] { return stopped_ || submitted_.load(std::memory_order_relaxed) != seen; });
      continue;
    }
    lock.unlock();
    run_chunks(*task);
    lock.lock();
    --task->workers_;
    // Under the mutex, so that await() cannot miss it between its test and its sleep.
    finished_.notify_all();
    // The last reference may go here: a Task frees plain memory only, so that is harmless.
    task.reset();
  }
}

void ThreadPool::await(Task& task) {
  for (int i = 0; i < kSpins; ++i) {
    if (task.done()) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [&] { return task.done(); });
}

void ThreadPool::wait(Task& task) noexcept {
  if (task.done()) return;
  if (task.generation_ != generation_) {
    // Forked: what the parent's threads had claimed will never be finished here.
    for (int64_t chunk = 0; chunk < task.chunks_; ++chunk) task.run(chunk);
    task.next_.store(task.chunks_, std::memory_order_relaxed);
    task.finished_.store(task.chunks_, std::memory_order_release);
    return;
  }
  run_chunks(task);
  await(task);
}

void ThreadPool::cancel(Task& task) {
  if (task.done() || task.generation_ != generation_) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!task.cancelled_) {
      task.cancelled_ = true;
      const int64_t claimed = task.next_.exchange(task.chunks_, std::memory_order_acq_rel);
      task.target_.store(std::min(claimed, task.chunks_), std::memory_order_release);
    }
  }
  await(task);
}

void ThreadPool::shutdown() {
  std::vector<std::thread> threads;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    threads.swap(threads_);
    queue_.clear();
  }
  work_.notify_all();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace batchops::collate
