// Division by a number that is fixed for a launch: a multiplication and a shift instead of the
// dozens of instructions of an integer division.
#pragma once
#include "kernels/cuda/runtime.cuh"

namespace batchops::cuda {

// Quotients of n < 2^31 by 1 ≤ divisor < 2^31. With s = ceil(log2 d) and
// m = floor(2^32 · (2^s − d) / d) + 1:  n / d = (mulhi(n, m) + n) >> s  (Granlund, Montgomery
// 1994).
struct FastDivide {
  unsigned divisor = 1;
  unsigned multiplier = 1;
  unsigned shift = 0;

  FastDivide() = default;
  explicit FastDivide(unsigned d) : divisor(d) {
    while ((1u << shift) < d) ++shift;
    const uint64_t numerator = ((uint64_t{1} << shift) - d) << 32;
    multiplier = static_cast<unsigned>(numerator / d + 1);
  }

  BATCHOPS_DEVICE unsigned quotient(unsigned n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
};

// Quotients of any n ≥ 0 by a positive divisor; fast where both are below 2^31.
struct WideDivide {
  int64_t divisor = 1;
  FastDivide fast;

  WideDivide() = default;
  explicit WideDivide(int64_t d) : divisor(d), fast(d < kLimit ? static_cast<unsigned>(d) : 1u) {}

  BATCHOPS_DEVICE int64_t quotient(int64_t n) const {
    if (n < kLimit) return divisor < kLimit ? fast.quotient(static_cast<unsigned>(n)) : 0;
    return n / divisor;
  }

 private:
  static constexpr int64_t kLimit = int64_t{1} << 31;
};

// Walks rows of `units` each, from a start that is worked out once with 64-bit division: step(t)
// gives the row, counted from the start's, and the column of the t-th unit from the start.
struct RowSplit {
  int64_t units = 1;
  FastDivide divide;

  RowSplit() = default;
  explicit RowSplit(int64_t per_row)
      : units(per_row), divide(per_row < kLongRow ? static_cast<unsigned>(per_row) : 1u) {}

  // `column` is the start's; t < 2^30.
  BATCHOPS_DEVICE void step(int64_t column, unsigned t, unsigned& row, int64_t& to_column) const {
    if (units < kLongRow) {
      unsigned in_row;
      step(static_cast<unsigned>(column), t, row, in_row);
      to_column = in_row;
    } else {  // so long that t cannot reach past the next row
      to_column = column + t;
      row = to_column >= units;
      if (row != 0) to_column -= units;
    }
  }
  // Where rows have less than 2^30 units.
  BATCHOPS_DEVICE void step(unsigned column, unsigned t, unsigned& row, unsigned& to_column) const {
    const unsigned sum = column + t;
    row = divide.quotient(sum);
    to_column = sum - row * divide.divisor;
  }

 private:
  static constexpr int64_t kLongRow = int64_t{1} << 30;
};

}  // namespace batchops::cuda
