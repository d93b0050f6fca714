// The samples of a batch where they lie: one address and one shape each.
//
//   sizes     of a sample, (L, d1, d2 ...): the same for all, or ragged in L
//   data[i]   its first item; `strided[i]` where it is not dense
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "collate/gather.h"

namespace batchops::collate {

struct Blocks {
  int64_t item_bytes = 0;
  std::vector<int64_t> sizes;  // of the first sample
  std::vector<const std::byte*> data;
  std::vector<int64_t> bytes;   // of each sample, dense
  std::vector<Column> strided;  // one row each; empty where every sample is dense

  enum class Added { ok, shape };

  // Takes one more sample. strides in bytes; `ragged` lets the first size differ.
  Added add(const void* address, const int64_t* sample_sizes, const int64_t* strides, int64_t dim,
            bool ragged);

  // Takes one more sample: row `row` of `column`. All columns have rows of the same shape.
  void add_row(const Column& column, int64_t row);

  int64_t count() const { return static_cast<int64_t>(data.size()); }
  int64_t total_bytes() const;
  int64_t longest_bytes() const;
  // Bytes of sizes[1:]: of one step along L.
  int64_t step_bytes() const;
  bool dense() const { return strided.empty(); }

  // Copies bytes [begin, end) of sample i, counted as if it were dense, to `out`. A strided sample
  // is copied whole.
  void copy(int64_t i, int64_t begin, int64_t end, std::byte* out, bool streaming) const noexcept;
};

}  // namespace batchops::collate
