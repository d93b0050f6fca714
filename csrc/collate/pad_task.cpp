#include "collate/pad_task.h"

#include <algorithm>
#include <cstring>

#include "collate/copy.h"

namespace batchops::collate {
namespace {

template <class T>
void fill_items(std::byte* out, int64_t count, const Item& item) {
  T value;
  std::memcpy(&value, item.data(), sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
}

struct Pair {
  uint64_t low;
  uint64_t high;
};

void fill(std::byte* out, int64_t bytes, const Item& item, int64_t item_bytes) {
  switch (item_bytes) {
    case 1:
      std::memset(out, static_cast<int>(item[0]), static_cast<size_t>(bytes));
      return;
    case 2:
      return fill_items<uint16_t>(out, bytes / 2, item);
    case 4:
      return fill_items<uint32_t>(out, bytes / 4, item);
    case 8:
      return fill_items<uint64_t>(out, bytes / 8, item);
    default:
      return fill_items<Pair>(out, bytes / 16, item);
  }
}

void fill_mask(std::byte* out, int64_t count, int mask_bytes, bool value) {
  if (mask_bytes == 1) {
    std::memset(out, value ? 1 : 0, static_cast<size_t>(count));
  } else {
    std::fill_n(reinterpret_cast<int64_t*>(out), count, int64_t{value});
  }
}

void count_up(int64_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = i;
}

int64_t rows_in_a_chunk(int64_t row_bytes) {
  return std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(row_bytes, 1));
}

}  // namespace

std::shared_ptr<PadTask> PadTask::make(std::shared_ptr<const Blocks> blocks, PadOutputs out,
                                       int64_t width, bool left, const Item& fill_value,
                                       const Item& label_fill, int max_threads) {
  const int64_t row = width * blocks->step_bytes();
  const int64_t row_bytes = row * ((out.values != nullptr) + (out.labels != nullptr)) +
                            width * (out.mask != nullptr ? out.mask_bytes : 0) +
                            width * (out.positions != nullptr ? 8 : 0);
  const int64_t rows = rows_in_a_chunk(row_bytes);
  const int64_t n = blocks->count();
  return std::shared_ptr<PadTask>(new PadTask(std::move(blocks), out, width, left, fill_value,
                                              label_fill, rows, (n + rows - 1) / rows,
                                              n * row_bytes, max_threads));
}

PadTask::PadTask(std::shared_ptr<const Blocks> blocks, PadOutputs out, int64_t width, bool left,
                 const Item& fill_value, const Item& label_fill, int64_t rows, int64_t chunks,
                 int64_t bytes, int max_threads)
    : Task(chunks, max_threads),
      blocks_(std::move(blocks)),
      out_(out),
      width_(width),
      left_(left),
      fill_(fill_value),
      label_fill_(label_fill),
      rows_(rows),
      bytes_(bytes) {}

void PadTask::row(int64_t i) const noexcept {
  const int64_t step = blocks_->step_bytes();
  const int64_t bytes = blocks_->bytes[static_cast<size_t>(i)];
  const int64_t length = step > 0 ? bytes / step : 0;
  const int64_t padding = width_ - length;
  const int64_t before = left_ ? padding : 0;
  const auto put = [&](std::byte* base, const Item& item) {
    if (base == nullptr) return;
    std::byte* const out = base + i * width_ * step;
    blocks_->copy(i, 0, bytes, out + before * step, false);
    fill(out + (left_ ? 0 : length * step), padding * step, item, blocks_->item_bytes);
  };
  put(out_.values, fill_);
  put(out_.labels, label_fill_);
  if (out_.mask != nullptr) {
    std::byte* const out = out_.mask + i * width_ * out_.mask_bytes;
    fill_mask(out + before * out_.mask_bytes, length, out_.mask_bytes, true);
    fill_mask(out + (left_ ? 0 : length) * out_.mask_bytes, padding, out_.mask_bytes, false);
  }
  if (out_.positions != nullptr) {
    int64_t* const out = out_.positions + i * width_;
    count_up(out + before, length);
    std::fill_n(out + (left_ ? 0 : length), padding, int64_t{0});
  }
  if (out_.lengths != nullptr) out_.lengths[i] = length;
}

void PadTask::run(int64_t chunk) noexcept {
  const int64_t end = std::min((chunk + 1) * rows_, blocks_->count());
  for (int64_t i = chunk * rows_; i < end; ++i) row(i);
}

std::shared_ptr<PackTask> PackTask::make(std::shared_ptr<const Blocks> blocks, PackOutputs out,
                                         const Item& separator, int max_threads) {
  const int64_t n = blocks->count();
  std::vector<int64_t> starts(static_cast<size_t>(n) + 1);
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) starts[i + 1] = starts[i] + blocks->bytes[i];
  const int64_t total = starts.back();
  const int64_t rows = rows_in_a_chunk(n > 0 ? total / n : 0);
  return std::shared_ptr<PackTask>(new PackTask(std::move(blocks), out, separator,
                                                std::move(starts), rows, (n + rows - 1) / rows,
                                                total, max_threads));
}

PackTask::PackTask(std::shared_ptr<const Blocks> blocks, PackOutputs out, const Item& separator,
                   std::vector<int64_t> starts, int64_t rows, int64_t chunks, int64_t bytes,
                   int max_threads)
    : Task(chunks, max_threads),
      blocks_(std::move(blocks)),
      out_(out),
      separator_(separator),
      starts_(std::move(starts)),
      rows_(rows),
      bytes_(bytes) {}

void PackTask::run(int64_t chunk) noexcept {
  const int64_t step = blocks_->step_bytes();
  const int64_t end = std::min((chunk + 1) * rows_, blocks_->count());
  for (int64_t i = chunk * rows_; i < end; ++i) {
    const int64_t start = starts_[static_cast<size_t>(i)];
    const int64_t bytes = blocks_->bytes[static_cast<size_t>(i)];
    const int64_t first = step > 0 ? start / step : 0;
    const int64_t length = step > 0 ? bytes / step : 0;
    if (out_.values != nullptr) blocks_->copy(i, 0, bytes, out_.values + start, false);
    if (out_.labels != nullptr) {
      blocks_->copy(i, 0, bytes, out_.labels + start, false);
      if (length > 0) fill(out_.labels + start, step, separator_, blocks_->item_bytes);
    }
    if (out_.positions != nullptr) count_up(out_.positions + first, length);
    if (out_.sequence != nullptr) {
      std::fill_n(out_.sequence + first, length, static_cast<int32_t>(i));
    }
    if (out_.offsets != nullptr) {
      if (i == 0) out_.offsets[0] = 0;
      out_.offsets[i + 1] = static_cast<int32_t>(first + length);
    }
  }
}

}  // namespace batchops::collate
