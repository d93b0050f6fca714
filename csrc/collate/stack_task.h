// out[i] = sample i: a batch of equal shapes, in chunks for the pool.
#pragma once
#include <memory>

#include "collate/blocks.h"
#include "collate/thread_pool.h"

namespace batchops::collate {

class StackTask final : public Task {
 public:
  // `out` receives blocks.total_bytes() bytes. The caller keeps samples and output alive until the
  // task is done or cancelled. Dense samples may be ragged: they lie end to end then (a pack).
  static std::shared_ptr<StackTask> make(std::shared_ptr<const Blocks> blocks, std::byte* out,
                                         int max_threads);

  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override;

 private:
  struct Chunk {
    int64_t sample;  // the first one
    int64_t begin;   // in its bytes
    int64_t end;     // in those of the last one
    int64_t last;
    int64_t out;  // where the first byte goes
  };

  StackTask(std::shared_ptr<const Blocks> blocks, std::byte* out, std::vector<Chunk> plan,
            int64_t bytes, int max_threads);

  const std::shared_ptr<const Blocks> blocks_;
  std::byte* const out_;
  const std::vector<Chunk> plan_;
  const int64_t bytes_;
};

}  // namespace batchops::collate
