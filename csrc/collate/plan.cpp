#include "collate/plan.h"

#include <algorithm>
#include <numeric>

namespace batchops::collate {
namespace {

// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, n): the high half of a product (Lemire 2019), without its last correction, whose
  // bias of n / 2^64 no number of epochs shows.
  uint64_t below(uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * n) >> 64);
  }

 private:
  uint64_t state_;
};

template <class T>
void shuffle(T* items, int64_t n, Random& random) {
  for (int64_t i = n - 1; i > 0; --i) {
    std::swap(items[i], items[random.below(static_cast<uint64_t>(i) + 1)]);
  }
}

// A shuffle of ten million items misses the cache ten million times. Items dealt to random piles,
// each shuffled in the cache, are as uniform (Rao 1961, Sandelius 1962).
template <class T>
void shuffle_large(Large<T>& items, Random& random) {
  constexpr size_t kCached = 1 << 15;
  constexpr size_t kPiles = 512;
  if (items.size() <= 2 * kCached) {
    shuffle(items.data(), static_cast<int64_t>(items.size()), random);
    return;
  }
  Large<uint16_t> pile(items.size());
  std::vector<size_t> ends(kPiles + 1, 0);
  for (size_t i = 0; i < pile.size(); ++i) {
    pile[i] = static_cast<uint16_t>(random.next() >> 55);
    ++ends[pile[i] + 1u];
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<size_t> next(ends.begin(), ends.end() - 1);
  Large<T> dealt(items.size());
  for (size_t i = 0; i < pile.size(); ++i) dealt[next[pile[i]]++] = items[i];
  items.swap(dealt);
  for (size_t p = 0; p < kPiles; ++p) {
    shuffle(items.data() + ends[p], static_cast<int64_t>(ends[p + 1] - ends[p]), random);
  }
}

struct Entry {
  int32_t length;
  int32_t sample;
};

// Longest first, equal lengths in the order they came: the first batch shows whether memory is
// enough. Two passes of counting where lengths are many.
void sort_by_length(Entry* begin, int64_t n, Large<Entry>& scratch) {
  if (n < 256) {
    std::stable_sort(begin, begin + n,
                     [](const Entry& a, const Entry& b) { return a.length > b.length; });
    return;
  }
  constexpr int kBits = 11;
  constexpr uint32_t kDigits = 1u << kBits;
  int32_t longest = 0;
  for (int64_t i = 0; i < n; ++i) longest = std::max(longest, begin[i].length);
  scratch.resize(static_cast<size_t>(n));
  Entry* from = begin;
  Entry* to = scratch.data();
  for (int shift = 0; shift < 31 && (longest >> shift) > 0; shift += kBits) {
    int64_t next[kDigits + 1] = {};
    const auto digit = [&](const Entry& e) {
      return kDigits - 1 - ((static_cast<uint32_t>(e.length) >> shift) & (kDigits - 1));
    };
    for (int64_t i = 0; i < n; ++i) ++next[digit(from[i]) + 1];
    for (uint32_t d = 0; d < kDigits; ++d) next[d + 1] += next[d];
    for (int64_t i = 0; i < n; ++i) to[next[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != begin) std::copy_n(from, n, begin);
}

}  // namespace

Large<int64_t> permutation(int64_t n, uint64_t seed) {
  Large<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(seed);
  shuffle_large(order, random);
  return order;
}

Plan plan_batches(const Large<int32_t>& lengths, const PlanOptions& options) {
  const auto n = static_cast<int64_t>(lengths.size());
  Large<Entry> entries(lengths.size());
  for (size_t i = 0; i < lengths.size(); ++i) entries[i] = {lengths[i], static_cast<int32_t>(i)};
  Random random(options.seed);
  if (options.shuffle) shuffle_large(entries, random);

  Large<Entry> scratch;
  const int64_t pool = options.pool == 0 ? std::max<int64_t>(n, 1) : options.pool;
  if (pool > 1) {
    for (int64_t i = 0; i < n; i += pool) {
      sort_by_length(entries.data() + i, std::min(pool, n - i), scratch);
    }
  }

  struct Range {
    int64_t begin;
    int64_t end;
  };
  Large<Range> batches;
  const int64_t multiple = std::max<int64_t>(options.multiple, 1);
  Range batch{0, 0};
  int64_t longest = 0;
  int64_t sum = 0;
  const auto close = [&](int64_t next) {
    if (batch.end > batch.begin) batches.push_back(batch);
    batch = {next, next};
    longest = 0;
    sum = 0;
  };
  for (int64_t i = 0; i < n; ++i) {
    const int64_t length = entries[static_cast<size_t>(i)].length;
    const int64_t tokens = (length + multiple - 1) / multiple * multiple;
    const int64_t count = batch.end - batch.begin + 1;
    const int64_t cost = options.padded ? count * std::max(longest, tokens) : sum + tokens;
    const bool over = options.max_tokens > 0 && cost > options.max_tokens;
    const bool full = options.max_samples > 0 && count > options.max_samples;
    if (over || full) close(i);
    if (options.skip_oversized && options.max_tokens > 0 && tokens > options.max_tokens) {
      close(i + 1);
      continue;
    }
    batch.end = i + 1;
    longest = std::max(longest, tokens);
    sum += tokens;
  }
  close(n);
  if (options.shuffle) shuffle_large(batches, random);

  Plan plan;
  plan.samples.reserve(entries.size());
  plan.starts.reserve(batches.size() + 1);
  plan.starts.push_back(0);
  for (const Range& range : batches) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      plan.samples.push_back(entries[static_cast<size_t>(i)].sample);
    }
    plan.starts.push_back(static_cast<int64_t>(plan.samples.size()));
  }
  return plan;
}

}  // namespace batchops::collate
