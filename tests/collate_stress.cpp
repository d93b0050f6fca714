// Random batches from several threads through one pool: waited for, cancelled and dropped at any
// moment. Built with sanitizers by test_data.py; prints "ok".
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "collate/gather_task.h"

using namespace batchops::collate;

namespace {

constexpr int64_t kRows = 500;

#define REQUIRE(condition)                                         \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

struct Source {
  explicit Source(int64_t row_bytes, int64_t padding) : stride(row_bytes + padding) {
    bytes.resize(static_cast<size_t>(kRows * stride));
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<std::byte>(i * 2654435761u >> 7);
    column = Column::make(bytes.data(), kRows, stride, 1, {row_bytes}, {1});
  }
  int64_t stride;
  std::vector<std::byte> bytes;
  Column column;
};

void stress(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  const Source wide(3000, 8);
  const Source word(8, 0);
  const auto table = std::make_shared<const Table>(Table{wide.column, word.column});
  for (int round = 0; round < rounds; ++round) {
    // Heap buffers that go right after: a late write is a use after free.
    auto rows = std::make_shared<std::vector<int64_t>>(1 + random() % 400);
    for (int64_t& row : *rows) row = static_cast<int64_t>(random() % kRows);
    std::vector<std::byte> out_wide(rows->size() * 3000);
    std::vector<std::byte> out_word(rows->size() * 8);
    auto task = GatherTask::make(table, rows, {out_wide.data(), out_word.data()},
                                 1 + static_cast<int>(random() % 4));
    ThreadPool& pool = ThreadPool::instance();
    const unsigned fate = random() % 8;
    if (fate != 0) pool.submit(task);
    if (fate == 1 || fate == 2) {
      pool.cancel(*task);
      if (fate == 2) pool.cancel(*task);
      continue;
    }
    if (fate == 3) std::this_thread::yield();
    pool.wait(*task);
    REQUIRE(task->done());
    for (size_t i = 0; i < rows->size(); ++i) {
      const auto row = static_cast<size_t>((*rows)[i]);
      REQUIRE(std::memcmp(&out_wide[i * 3000], &wide.bytes[row * 3008], 3000) == 0);
      REQUIRE(std::memcmp(&out_word[i * 8], &word.bytes[row * 8], 8) == 0);
    }
  }
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < 4; ++k) threads.emplace_back([k] { stress(k, 150); });
  for (std::thread& thread : threads) thread.join();
#if !defined(__SANITIZE_THREAD__)  // which does not follow threads into a forked child
  const pid_t child = fork();
  if (child == 0) {
    stress(99, 20);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  REQUIRE(status == 0);
#endif
  ThreadPool::instance().shutdown();
  stress(100, 20);
  REQUIRE(ThreadPool::instance().threads() == 0);
  std::puts("ok");
}
