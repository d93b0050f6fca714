#include "collate/gather.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "collate/copy.h"

namespace batchops::collate {
namespace {

// Rows come from all over a table that is larger than the caches; the hardware prefetcher sees the
// inside of a row, not the next row. Fetch the head of the row after the next.
constexpr int64_t kPrefetchBytes = 512;
constexpr int64_t kLine = 64;

inline void prefetch_row(const std::byte* row, int64_t row_bytes) {
  const int64_t bytes = std::min(row_bytes, kPrefetchBytes);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(row + i, 0, 3);
}

// Rows of one machine word (labels): the compiler's loop beats a call of memcpy for each. memcpy of
// a constant size is one move, and says nothing of alignment or type.
template <size_t Bytes>
void gather_words(const Column& column, const int64_t* rows, int64_t begin, int64_t end,
                  std::byte* out) {
  out += begin * static_cast<int64_t>(Bytes);
  for (int64_t i = begin; i < end; ++i, out += Bytes) {
    std::memcpy(out, column.data + rows[i] * column.row_stride, Bytes);
  }
}

void gather_dense(const Column& column, const int64_t* rows, int64_t begin, int64_t end,
                  std::byte* out, bool streaming) {
  const int64_t row_bytes = column.row_bytes;
  const bool packed = column.row_stride == row_bytes;
  out += begin * row_bytes;
  for (int64_t i = begin; i < end;) {
    // Consecutive rows (no shuffle) are one copy.
    int64_t run = 1;
    if (packed) {
      while (i + run < end && rows[i + run] == rows[i] + run) ++run;
    }
    const std::byte* in = column.data + rows[i] * column.row_stride;
    if (run == 1 && i + 2 < end) {
      prefetch_row(column.data + rows[i + 2] * column.row_stride, row_bytes);
    }
    const size_t bytes = static_cast<size_t>(run * row_bytes);
    if (streaming) {
      copy_streaming(out, in, bytes);
    } else {
      std::memcpy(out, in, bytes);
    }
    out += bytes;
    i += run;
  }
}

template <size_t Bytes>
std::byte* pack(const std::byte* in, const Column::Dim* dims, size_t count, std::byte* out) {
  const auto [size, stride] = *dims;
  if (count > 1) {
    for (int64_t i = 0; i < size; ++i) out = pack<Bytes>(in + i * stride, dims + 1, count - 1, out);
    return out;
  }
  if (stride == static_cast<int64_t>(Bytes)) {
    std::memcpy(out, in, static_cast<size_t>(size) * Bytes);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      std::memcpy(out + i * static_cast<int64_t>(Bytes), in + i * stride, Bytes);
    }
  }
  return out + size * static_cast<int64_t>(Bytes);
}

template <size_t Bytes>
void gather_strided(const Column& column, const int64_t* rows, int64_t begin, int64_t end,
                    std::byte* out) {
  out += begin * column.row_bytes;
  for (int64_t i = begin; i < end; ++i) {
    out = pack<Bytes>(column.data + rows[i] * column.row_stride, column.dims.data(),
                      column.dims.size(), out);
  }
}

template <class From, class To>
void convert_all(const std::byte* in, int64_t items, std::byte* out) {
  for (int64_t i = 0; i < items; ++i) {
    From from;
    std::memcpy(&from, in + i * static_cast<int64_t>(sizeof(From)), sizeof(From));
    const auto to = static_cast<To>(from);
    std::memcpy(out + i * static_cast<int64_t>(sizeof(To)), &to, sizeof(To));
  }
}

struct Cast {
  const char* name;
  void (*convert)(const std::byte* in, int64_t items, std::byte* out);
  int64_t item_bytes;
};

constexpr Cast kCasts[] = {
    {"int8 to int64", convert_all<int8_t, int64_t>, 8},
    {"int16 to int64", convert_all<int16_t, int64_t>, 8},
    {"int32 to int64", convert_all<int32_t, int64_t>, 8},
    {"uint8 to int64", convert_all<uint8_t, int64_t>, 8},
    {"uint16 to int64", convert_all<uint16_t, int64_t>, 8},
    {"uint32 to int64", convert_all<uint32_t, int64_t>, 8},
    {"float32 to float64", convert_all<float, double>, 8},
    {"float64 to float32", convert_all<double, float>, 4},
};

void gather_converted(const Column& column, const int64_t* rows, int64_t begin, int64_t end,
                      std::byte* out) {
  const int64_t items = column.row_bytes / column.item_bytes;
  out += begin * column.row_bytes;
  for (int64_t i = begin; i < end; ++i, out += column.row_bytes) {
    if (i + 2 < end) {
      prefetch_row(column.data + rows[i + 2] * column.row_stride, column.row_stride);
    }
    column.convert(column.data + rows[i] * column.row_stride, items, out);
  }
}

}  // namespace

void Column::convert_items(const std::string& cast) {
  const auto* const known = std::find_if(std::begin(kCasts), std::end(kCasts),
                                         [&](const Cast& known) { return cast == known.name; });
  if (known == std::end(kCasts) || !dense()) {
    throw std::invalid_argument("gather: cast: expected a known one of dense rows, got " + cast);
  }
  row_bytes = row_bytes / item_bytes * known->item_bytes;
  item_bytes = known->item_bytes;
  convert = known->convert;
}

Column Column::make(const void* data, int64_t rows, int64_t row_stride, int64_t item_bytes,
                    const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size()) {
    throw std::invalid_argument("gather: strides: expected one for each of " +
                                std::to_string(sizes.size()) + " sizes, got " +
                                std::to_string(strides.size()));
  }
  if (item_bytes != 1 && item_bytes != 2 && item_bytes != 4 && item_bytes != 8 &&
      item_bytes != 16) {
    throw std::invalid_argument("gather: item_bytes: expected 1, 2, 4, 8 or 16, got " +
                                std::to_string(item_bytes));
  }
  if (rows < 0 || row_stride < 0) {
    throw std::invalid_argument("gather: rows, row_stride: expected no negative, got " +
                                std::to_string(rows) + ", " + std::to_string(row_stride));
  }
  Column column;
  column.data = static_cast<const std::byte*>(data);
  column.rows = rows;
  column.row_stride = row_stride;
  column.item_bytes = item_bytes;
  column.row_bytes = item_bytes;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 0 || strides[i] < 0) {
      throw std::invalid_argument("gather: sizes, strides: expected no negative, got " +
                                  std::to_string(sizes[i]) + ", " + std::to_string(strides[i]));
    }
    column.row_bytes *= sizes[i];
    if (sizes[i] == 1) continue;
    if (!column.dims.empty() && column.dims.back().stride == sizes[i] * strides[i]) {
      column.dims.back() = {column.dims.back().size * sizes[i], strides[i]};
    } else {
      column.dims.push_back({sizes[i], strides[i]});
    }
  }
  if (column.dims.size() == 1 && column.dims[0].stride == item_bytes) column.dims.clear();
  if (column.row_bytes == 0) column.dims.clear();
  if (data == nullptr && rows > 0 && column.row_bytes > 0) {
    throw std::invalid_argument("gather: data: expected an address, got null");
  }
  return column;
}

bool normalize(std::vector<int64_t>& indices, int64_t size) {
  bool valid = true;
  for (int64_t& index : indices) {
    index += index < 0 ? size : 0;
    valid &= static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
  }
  return valid;
}

void gather(const Column& column, const int64_t* rows, int64_t begin, int64_t end, std::byte* out,
            bool streaming) noexcept {
  if (column.row_bytes == 0) return;
  if (column.convert != nullptr) return gather_converted(column, rows, begin, end, out);
  if (!column.dense()) {
    switch (column.item_bytes) {
      case 1:
        return gather_strided<1>(column, rows, begin, end, out);
      case 2:
        return gather_strided<2>(column, rows, begin, end, out);
      case 4:
        return gather_strided<4>(column, rows, begin, end, out);
      case 8:
        return gather_strided<8>(column, rows, begin, end, out);
      default:
        return gather_strided<16>(column, rows, begin, end, out);
    }
  }
  switch (column.row_bytes) {
    case 1:
      return gather_words<1>(column, rows, begin, end, out);
    case 2:
      return gather_words<2>(column, rows, begin, end, out);
    case 4:
      return gather_words<4>(column, rows, begin, end, out);
    case 8:
      return gather_words<8>(column, rows, begin, end, out);
    case 16:
      return gather_words<16>(column, rows, begin, end, out);
    default:
      break;
  }
  gather_dense(column, rows, begin, end, out, streaming);
  if (streaming) streaming_fence();
}

}  // namespace batchops::collate
