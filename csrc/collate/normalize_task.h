// out = uint8 · scale[c] + shift[c], in one pass with the change of layout and of dtype.
//
//   in    (H, W, C) or (C, H, W), uint8         out   (C, H, W) or (H, W, C), fp32, bf16 or fp16
//
// One fused multiply-add in fp32, then rounded to nearest even.
#pragma once
#include <memory>
#include <vector>

#include "collate/blocks.h"
#include "collate/thread_pool.h"

namespace batchops::collate {

enum class FloatType { fp32, bf16, fp16 };

struct Pixels {
  int64_t channels = 0;
  int64_t pixels = 0;  // H · W
  bool channels_last_in = false;
  bool channels_last_out = false;
  FloatType type = FloatType::fp32;
  std::vector<float> scale;  // one for each channel
  std::vector<float> shift;
};

class NormalizeTask final : public Task {
 public:
  // Dense uint8 samples of `pixels.pixels` · `pixels.channels` bytes each.
  static std::shared_ptr<NormalizeTask> make(std::shared_ptr<const Blocks> blocks, Pixels pixels,
                                             std::byte* out, int max_threads);
  int64_t bytes() const override { return bytes_; }

 protected:
  void run(int64_t chunk) noexcept override;

 private:
  NormalizeTask(std::shared_ptr<const Blocks> blocks, Pixels pixels, std::byte* out, int64_t step,
                int64_t parts, int64_t bytes, int max_threads);

  const std::shared_ptr<const Blocks> blocks_;
  const Pixels pixels_;
  std::byte* const out_;
  const int64_t step_;   // pixels of a chunk
  const int64_t parts_;  // chunks of a sample
  const int64_t bytes_;
  std::vector<float> scales_;  // repeated to whole vectors, for interleaved channels
  std::vector<float> shifts_;
};

}  // namespace batchops::collate
