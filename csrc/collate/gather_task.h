// One batch on its way: every column of a table gathered by the same rows, in chunks for the pool.
#pragma once
#include <memory>
#include <vector>

#include "collate/gather.h"
#include "collate/thread_pool.h"

namespace batchops::collate {

using Table = std::vector<Column>;

class GatherTask final : public Task {
 public:
  // out[c] receives rows.size() * table[c].row_bytes bytes. The caller keeps the table's data and
  // the outputs alive until the task is done or cancelled.
  static std::shared_ptr<GatherTask> make(std::shared_ptr<const Table> table,
                                          std::shared_ptr<const std::vector<int64_t>> rows,
                                          std::vector<std::byte*> out, int max_threads);

  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override;

 private:
  struct Chunk {
    size_t column;
    int64_t begin;
    int64_t end;
  };

  GatherTask(std::shared_ptr<const Table> table, std::shared_ptr<const std::vector<int64_t>> rows,
             std::vector<std::byte*> out, std::vector<Chunk> chunks, int64_t bytes,
             int max_threads);

  const std::shared_ptr<const Table> table_;
  const std::shared_ptr<const std::vector<int64_t>> rows_;
  const std::vector<std::byte*> out_;
  const std::vector<Chunk> plan_;
  const int64_t bytes_;
};

}  // namespace batchops::collate
