#include "collate/gather_task.h"

#include <algorithm>

#include "collate/copy.h"

namespace batchops::collate {
std::shared_ptr<GatherTask> GatherTask::make(std::shared_ptr<const Table> table,
                                             std::shared_ptr<const std::vector<int64_t>> rows,
                                             std::vector<std::byte*> out, int max_threads) {
  const int64_t n = static_cast<int64_t>(rows->size());
  std::vector<Chunk> chunks;
  int64_t bytes = 0;
  for (size_t c = 0; c < table->size(); ++c) {
    const int64_t row_bytes = std::max<int64_t>((*table)[c].row_bytes, 1);
    const int64_t step = std::max<int64_t>(kChunkBytes / row_bytes, 1);
    for (int64_t i = 0; i < n; i += step) chunks.push_back({c, i, std::min(i + step, n)});
    bytes += n * row_bytes;
  }
  return std::shared_ptr<GatherTask>(new GatherTask(
      std::move(table), std::move(rows), std::move(out), std::move(chunks), bytes, max_threads));
}

GatherTask::GatherTask(std::shared_ptr<const Table> table,
                       std::shared_ptr<const std::vector<int64_t>> rows,
                       std::vector<std::byte*> out, std::vector<Chunk> chunks, int64_t bytes,
                       int max_threads)
    : Task(static_cast<int64_t>(chunks.size()), max_threads),
      table_(std::move(table)),
      rows_(std::move(rows)),
      out_(std::move(out)),
      plan_(std::move(chunks)),
      bytes_(bytes) {}

void GatherTask::run(int64_t chunk) noexcept {
  const auto& [column, begin, end] = plan_[static_cast<size_t>(chunk)];
  gather((*table_)[column], rows_->data(), begin, end, out_[column], bytes_ >= kStreamingBytes);
}

}  // namespace batchops::collate
