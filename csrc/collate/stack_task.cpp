#include "collate/stack_task.h"

#include <algorithm>

#include "collate/copy.h"

namespace batchops::collate {

std::shared_ptr<StackTask> StackTask::make(std::shared_ptr<const Blocks> blocks, std::byte* out,
                                           int max_threads) {
  std::vector<Chunk> plan;
  const int64_t n = blocks->count();
  int64_t position = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t bytes = blocks->bytes[static_cast<size_t>(i)];
    if (bytes >= 2 * kChunkBytes && blocks->dense()) {
      for (int64_t begin = 0; begin < bytes; begin += kChunkBytes) {
        const int64_t end = std::min(begin + kChunkBytes, bytes);
        plan.push_back({i, begin, end, i, position + begin});
      }
      position += bytes;
      ++i;
      continue;
    }
    Chunk chunk{i, 0, bytes, i, position};
    int64_t taken = bytes;
    for (++i; i < n && taken < kChunkBytes; ++i) {
      chunk.last = i;
      chunk.end = blocks->bytes[static_cast<size_t>(i)];
      taken += chunk.end;
    }
    position += taken;
    plan.push_back(chunk);
  }
  return std::shared_ptr<StackTask>(
      new StackTask(std::move(blocks), out, std::move(plan), position, max_threads));
}

StackTask::StackTask(std::shared_ptr<const Blocks> blocks, std::byte* out, std::vector<Chunk> plan,
                     int64_t bytes, int max_threads)
    : Task(static_cast<int64_t>(plan.size()), max_threads),
      blocks_(std::move(blocks)),
      out_(out),
      plan_(std::move(plan)),
      bytes_(bytes) {}

void StackTask::run(int64_t chunk) noexcept {
  const Chunk& c = plan_[static_cast<size_t>(chunk)];
  const bool streaming = bytes_ >= kStreamingBytes;
  std::byte* out = out_ + c.out;
  for (int64_t i = c.sample; i <= c.last; ++i) {
    // Samples lie anywhere: the hardware sees the inside of one, and not the next.
    if (i + 4 <= c.last) __builtin_prefetch(blocks_->data[static_cast<size_t>(i + 4)]);
    const int64_t begin = i == c.sample ? c.begin : 0;
    const int64_t end = i == c.last ? c.end : blocks_->bytes[static_cast<size_t>(i)];
    blocks_->copy(i, begin, end, out, streaming);
    out += end - begin;
  }
  if (streaming) streaming_fence();
}

}  // namespace batchops::collate
