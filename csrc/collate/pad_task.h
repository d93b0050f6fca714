// Sequences of unequal lengths as one batch: padded to a rectangle, or end to end.
//
//   PadTask    values (n, width, ...)       a a a . .      mask 1 1 1 0 0   positions 0 1 2 0 0
//                                           b b . . .           1 1 0 0 0             0 1 0 0 0
//   PackTask   values (total, ...)          a a a b b                       positions 0 1 2 0 1
//
// Every output is written in one pass; a null pointer leaves it out.
#pragma once
#include <array>
#include <memory>

#include "collate/blocks.h"
#include "collate/thread_pool.h"

namespace batchops::collate {

using Item = std::array<std::byte, 16>;  // one value of item_bytes bytes, and room

struct PadOutputs {
  std::byte* values = nullptr;   // (n, width, ...)
  std::byte* labels = nullptr;   // the same values, with label_fill where there are none
  std::byte* mask = nullptr;     // (n, width), 1 where there is a value
  int mask_bytes = 8;            // 1 or 8
  int64_t* positions = nullptr;  // (n, width): step in the sequence, 0 where there is none
  int64_t* lengths = nullptr;    // (n,)
};

class PadTask final : public Task {
 public:
  // Widths in steps along the first dimension; no sample is longer. `left`: padding comes first.
  static std::shared_ptr<PadTask> make(std::shared_ptr<const Blocks> blocks, PadOutputs out,
                                       int64_t width, bool left, const Item& fill,
                                       const Item& label_fill, int max_threads);
  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override;

 private:
  PadTask(std::shared_ptr<const Blocks> blocks, PadOutputs out, int64_t width, bool left,
          const Item& fill, const Item& label_fill, int64_t rows, int64_t chunks, int64_t bytes,
          int max_threads);
  void row(int64_t i) const noexcept;

  const std::shared_ptr<const Blocks> blocks_;
  const PadOutputs out_;
  const int64_t width_;
  const bool left_;
  const Item fill_;
  const Item label_fill_;
  const int64_t rows_;  // of a chunk
  const int64_t bytes_;
};

struct PackOutputs {
  std::byte* values = nullptr;   // (total, ...)
  std::byte* labels = nullptr;   // the same, the first step of each sequence replaced
  int64_t* positions = nullptr;  // (total,)
  int32_t* sequence = nullptr;   // (total,): which one
  int32_t* offsets = nullptr;    // (n + 1,): where each begins, and the total
};

class PackTask final : public Task {
 public:
  static std::shared_ptr<PackTask> make(std::shared_ptr<const Blocks> blocks, PackOutputs out,
                                        const Item& separator, int max_threads);
  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override;

 private:
  PackTask(std::shared_ptr<const Blocks> blocks, PackOutputs out, const Item& separator,
           std::vector<int64_t> starts, int64_t rows, int64_t chunks, int64_t bytes,
           int max_threads);

  const std::shared_ptr<const Blocks> blocks_;
  const PackOutputs out_;
  const Item separator_;
  const std::vector<int64_t> starts_;  // in bytes
  const int64_t rows_;
  const int64_t bytes_;
};

}  // namespace batchops::collate
