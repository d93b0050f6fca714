// Batches of samples of known lengths, planned ahead: every process makes the same plan from the
// same seed, so ranks agree without a word.
#pragma once
#include <cstdint>
#include <span>

#include "collate/large.h"

namespace batchops::collate {

// A uniform permutation of [0, n) that depends on the seed alone.
Large<int64_t> permutation(int64_t n, uint64_t seed);

struct Plan {
  Large<int32_t> samples;  // all batches end to end
  Large<int64_t> starts;   // batch b is samples[starts[b], starts[b + 1])
};

struct PlanOptions {
  int64_t max_tokens = 0;   // 0: no budget
  int64_t max_samples = 0;  // of a batch; 0: any number
  int64_t multiple = 1;     // lengths count as rounded up to it
  bool padded = true;       // a batch costs count · longest, otherwise the sum of its lengths
  bool shuffle = true;
  int64_t pool = 0;             // samples sorted by length together; 0: all, 1: none
  bool skip_oversized = false;  // otherwise a sample over the budget is a batch of its own
  uint64_t seed = 0;
};

// Expects lengths in [0, 2^31), and fewer than 2^31 of them.
Plan plan_batches(std::span<const int64_t> lengths, const PlanOptions& options);

}  // namespace batchops::collate
