// Rows of a table, copied by index: out[i] = source[rows[i]].
//
//   source   row 0  |-- row_bytes --|....      row r begins at data + r * row_stride
//            row 1  |---------------|....      (strides in bytes; any stride, 0 too)
//   out      dense, row i begins at out + i * row_bytes
//
// A row is dense, or a strided block (an HWC image seen as CHW) that is packed on the way. Items of
// a dense row may become those of a wider or narrower type.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace batchops::collate {

struct Column {
  struct Dim {
    int64_t size;
    int64_t stride;  // bytes
  };

  const std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t row_stride = 0;
  int64_t row_bytes = 0;
  int64_t item_bytes = 0;
  std::vector<Dim> dims;  // of a row, outermost first; empty when it is dense
  // Items to another type; row_bytes and item_bytes are those of the output.
  void (*convert)(const std::byte* in, int64_t items, std::byte* out) = nullptr;

  // sizes and strides (bytes) of one row, as a tensor library states them. Dimensions that can be
  // walked as one are merged. Throws std::invalid_argument for what no tensor can be.
  static Column make(const void* data, int64_t rows, int64_t row_stride, int64_t item_bytes,
                     const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

  // `cast` names types, "int32 to int64". Throws std::invalid_argument for those it does not know,
  // and for rows that are not dense.
  void convert_items(const std::string& cast);

  // Whether a row is copied as it is.
  bool dense() const { return dims.empty() && convert == nullptr; }
};

// Turns Python-style indices in [-size, size) into rows in [0, size), in place. Returns false, with
// nothing promised about `indices`, when one is out of range.
bool normalize(std::vector<int64_t>& indices, int64_t size);

// Copies rows[begin, end) of `column` to `out`, the start of the whole output. Indices have been
// checked. `streaming` writes past the caches, for outputs that would only evict what is there.
void gather(const Column& column, const int64_t* rows, int64_t begin, int64_t end, std::byte* out,
            bool streaming) noexcept;

}  // namespace batchops::collate
