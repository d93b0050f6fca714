// Several tasks as one, for the pool and for who waits.
#pragma once
#include <memory>
#include <vector>

#include "collate/thread_pool.h"

namespace batchops::collate {

class JoinedTask final : public Task {
 public:
  static std::shared_ptr<JoinedTask> make(std::vector<std::shared_ptr<Task>> parts,
                                          int max_threads) {
    int64_t chunks = 0;
    int64_t bytes = 0;
    for (const auto& part : parts) {
      chunks += part->chunks();
      bytes += part->bytes();
    }
    return std::shared_ptr<JoinedTask>(
        new JoinedTask(std::move(parts), chunks, bytes, max_threads));
  }
  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override {
    size_t part = 0;
    while (chunk >= parts_[part]->chunks()) chunk -= parts_[part++]->chunks();
    run_chunk(*parts_[part], chunk);
  }

 private:
  JoinedTask(std::vector<std::shared_ptr<Task>> parts, int64_t chunks, int64_t bytes,
             int max_threads)
      : Task(chunks, max_threads), parts_(std::move(parts)), bytes_(bytes) {}

  const std::vector<std::shared_ptr<Task>> parts_;
  const int64_t bytes_;
};

}  // namespace batchops::collate
