// How long the norms sum in the accumulating precision before they hand on to double.
#pragma once
#include <cstdint>

namespace batchops {

constexpr int64_t kPieceElements = 8192;  // along one run
constexpr int64_t kRowsPerFlush = 128;    // down the columns of rows

}  // namespace batchops
