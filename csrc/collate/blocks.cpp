#include "collate/blocks.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "collate/copy.h"

namespace batchops::collate {
namespace {

bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t item_bytes) {
  int64_t expected = item_bytes;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Column as_column(const void* address, const int64_t* sizes, const int64_t* strides, int64_t dim,
                 int64_t item_bytes) {
  return Column::make(address, 1, 0, item_bytes, std::vector<int64_t>(sizes, sizes + dim),
                      std::vector<int64_t>(strides, strides + dim));
}

}  // namespace

Blocks::Added Blocks::add(const void* address, const int64_t* sample_sizes, const int64_t* strides,
                          int64_t dim, bool ragged) {
  if (data.empty()) {
    sizes.assign(sample_sizes, sample_sizes + dim);
  } else {
    const auto first = static_cast<size_t>(ragged && dim > 0);
    if (dim != static_cast<int64_t>(sizes.size()) ||
        !std::equal(sizes.begin() + static_cast<int64_t>(first), sizes.end(),
                    sample_sizes + first)) {
      return Added::shape;
    }
  }
  int64_t n = item_bytes;
  for (int64_t d = 0; d < dim; ++d) n *= sample_sizes[d];
  const bool dense_now = n == 0 || is_dense(sample_sizes, strides, dim, item_bytes);
  if (!dense_now || !strided.empty()) {
    // From the first strided sample on, every sample has a Column: those before it get theirs.
    while (strided.size() < data.size()) {
      Column dense_column;
      dense_column.data = data[strided.size()];
      dense_column.rows = 1;
      dense_column.row_bytes = bytes[strided.size()];
      dense_column.item_bytes = item_bytes;
      strided.push_back(std::move(dense_column));
    }
    if (n == 0) {
      strided.emplace_back();
    } else {
      strided.push_back(as_column(address, sample_sizes, strides, dim, item_bytes));
    }
  }
  data.push_back(static_cast<const std::byte*>(address));
  bytes.push_back(n);
  return Added::ok;
}

void Blocks::add_row(const Column& column, int64_t row) {
  const std::byte* const address = column.data + row * column.row_stride;
  item_bytes = column.item_bytes;
  if (!column.dense() || !strided.empty()) {
    while (strided.size() < data.size()) {
      Column before;
      before.data = data[strided.size()];
      before.rows = 1;
      before.row_bytes = bytes[strided.size()];
      before.item_bytes = item_bytes;
      strided.push_back(std::move(before));
    }
    strided.push_back(column);
    strided.back().data = address;
    strided.back().rows = 1;
  }
  data.push_back(address);
  bytes.push_back(column.row_bytes);
}

int64_t Blocks::total_bytes() const {
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
}

int64_t Blocks::longest_bytes() const {
  return bytes.empty() ? 0 : *std::max_element(bytes.begin(), bytes.end());
}

int64_t Blocks::step_bytes() const {
  int64_t n = item_bytes;
  for (size_t d = 1; d < sizes.size(); ++d) n *= sizes[d];
  return n;
}

void Blocks::copy(int64_t i, int64_t begin, int64_t end, std::byte* out,
                  bool streaming) const noexcept {
  const auto k = static_cast<size_t>(i);
  if (bytes[k] == 0) return;
  if (!strided.empty() && !strided[k].dense()) {
    constexpr int64_t kOnlyRow = 0;
    gather(strided[k], &kOnlyRow, 0, 1, out, false);
    return;
  }
  const auto n = static_cast<size_t>(end - begin);
  if (streaming) {
    copy_streaming(out, data[k] + begin, n);
  } else {
    std::memcpy(out, data[k] + begin, n);
  }
}

}  // namespace batchops::collate
