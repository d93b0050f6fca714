// The threads that fill batches: one pool for the process, shared by every loader.
//
// A Task is work cut into chunks that any thread may run in any order. The thread that waits for a
// task runs chunks of it too, so a task completes with no pool thread at all: in a forked child, at
// interpreter exit, or where the system refuses another thread.
//
// Pool threads never run Python and never hold a lock while they copy.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace batchops::collate {

// Small enough that threads finish together and that a cancelled batch is over at once (some 20
// µs), large enough that claiming a chunk costs nothing beside it.
constexpr int64_t kChunkBytes = 128 << 10;

class Task {
 public:
  // `max_threads` bounds the pool threads that work on this task at one time.
  Task(int64_t chunks, int max_threads)
      : chunks_(chunks), max_threads_(max_threads), target_(chunks) {}
  virtual ~Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  int64_t chunks() const { return chunks_; }
  // What it writes: a small task is not worth waking a thread.
  virtual int64_t bytes() const = 0;
  bool done() const {
    return finished_.load(std::memory_order_acquire) >= target_.load(std::memory_order_acquire);
  }

 protected:
  // Idempotent: a forked child runs again what its parent's threads had under way.
  virtual void run(int64_t chunk) noexcept = 0;
  static void run_chunk(Task& task, int64_t chunk) noexcept { task.run(chunk); }

 private:
  friend class ThreadPool;
  const int64_t chunks_;
  const int max_threads_;
  int workers_ = 0;          // pool threads on this task, guarded by the pool's mutex
  uint64_t generation_ = 0;  // of the pool that it was submitted to
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> finished_{0};
  std::atomic<int64_t> target_;  // chunks to finish: fewer than chunks_ once cancelled
  bool cancelled_ = false;       // guarded by the pool's mutex
};

class ThreadPool {
 public:
  static constexpr int kMaxThreads = 16;

  // The pool of this process; a forked child gets an empty one.
  static ThreadPool& instance();

  // Starts `task` in the background. Never blocks on other tasks, never throws for want of threads.
  void submit(std::shared_ptr<Task> task);

  // Returns when all of `task` is done, helping with it.
  void wait(Task& task) noexcept;

  // Runs chunks of a task that was never submitted until all are taken: for a team of other
  // threads, with which the task is done when the last of them returns.
  static void take_part(Task& task) noexcept { run_chunks(task); }

  // Drops the chunks that no thread has begun and returns when the begun ones are over: after it,
  // no thread touches the memory that `task` refers to. A task cancelled twice, or waited for
  // after, is done.
  void cancel(Task& task);

  // Joins all threads; tasks submitted later run in wait().
  void shutdown();

  int threads() const;

 private:
  explicit ThreadPool(uint64_t generation) : generation_(generation) {}
  static void run_chunks(Task& task);
  void await(Task& task);
  void worker();
  std::shared_ptr<Task> next_task();
  void start_threads(int wanted);

  static ThreadPool* create();
  static void before_fork();
  static void after_fork_in_parent();
  static void after_fork_in_child();

  const uint64_t generation_;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable finished_;
  std::deque<std::shared_ptr<Task>> queue_;
  std::vector<std::thread> threads_;
  std::atomic<uint64_t> submitted_{0};
  bool stopped_ = false;
};

}  // namespace batchops::collate
