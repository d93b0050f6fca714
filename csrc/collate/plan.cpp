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
void shuffle_large(T* items, size_t n, Random& random) {
  constexpr size_t kCached = 1 << 15;
  constexpr size_t kPiles = 512;
  if (n <= 2 * kCached) {
    shuffle(items, static_cast<int64_t>(n), random);
    return;
  }
  Large<uint16_t> pile(n);
  std::vector<size_t> ends(kPiles + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    pile[i] = static_cast<uint16_t>(random.next() >> 55);
    ++ends[pile[i] + 1u];
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<size_t> next(ends.begin(), ends.end() - 1);
  Large<T> dealt(n);
  for (size_t i = 0; i < n; ++i) dealt[next[pile[i]]++] = items[i];
  for (size_t p = 0; p < kPiles; ++p) {
    shuffle(dealt.data() + ends[p], static_cast<int64_t>(ends[p + 1] - ends[p]), random);
  }
  std::copy(dealt.begin(), dealt.end(), items);
}

struct Entry {
  int32_t length;
  int32_t sample;
};

// Longest first, equal lengths in the order they came: the first batch shows whether memory is
// enough. Some passes of counting, eleven bits each; the first one reads from where they lie.
template <class At>
void sort_by_length(At first, Entry* out, int64_t n, Large<Entry>& scratch) {
  constexpr int kBits = 11;
  constexpr uint32_t kDigits = 1u << kBits;
  int32_t longest = 0;
  for (int64_t i = 0; i < n; ++i) longest = std::max(longest, first(i).length);
  int passes = 1;
  while (passes * kBits < 31 && longest >> (passes * kBits) > 0) ++passes;
  if (passes > 1) scratch.resize(static_cast<size_t>(n));
  const auto pass = [&](int shift, auto at, Entry* to) {
    int64_t next[kDigits + 1] = {};
    const auto digit = [&](const Entry& e) {
      return kDigits - 1 - ((static_cast<uint32_t>(e.length) >> shift) & (kDigits - 1));
    };
    for (int64_t i = 0; i < n; ++i) ++next[digit(at(i)) + 1];
    for (uint32_t d = 0; d < kDigits; ++d) next[d + 1] += next[d];
    for (int64_t i = 0; i < n; ++i) {
      const Entry entry = at(i);
      const int64_t place = next[digit(entry)]++;
      if (place < n) to[place] = entry;  // lengths may be another thread's to change meanwhile
    }
  };
  // So that the last one writes to `out`.
  Entry* to = passes % 2 == 1 ? out : scratch.data();
  pass(0, first, to);
  for (int k = 1; k < passes; ++k) {
    const Entry* const from = to;
    to = to == out ? scratch.data() : out;
    pass(k * kBits, [from](int64_t i) { return from[i]; }, to);
  }
}

// The samples of a pool, sorted in place.
void sort_pool(Entry* begin, int64_t n, Large<Entry>& scratch, Large<Entry>& copy) {
  if (n < 256) {
    std::stable_sort(begin, begin + n,
                     [](const Entry& a, const Entry& b) { return a.length > b.length; });
    return;
  }
  copy.assign(begin, begin + n);
  sort_by_length([&](int64_t i) { return copy[static_cast<size_t>(i)]; }, begin, n, scratch);
}

void shuffle_equals(Large<Entry>& entries, Random& random) {
  for (size_t begin = 0; begin < entries.size();) {
    size_t end = begin + 1;
    while (end < entries.size() && entries[end].length == entries[begin].length) ++end;
    shuffle_large(entries.data() + begin, end - begin, random);
    begin = end;
  }
}

}  // namespace

Large<int64_t> permutation(int64_t n, uint64_t seed) {
  Large<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(seed);
  shuffle_large(order.data(), order.size(), random);
  return order;
}

Plan plan_batches(std::span<const int64_t> lengths, const PlanOptions& options) {
  const auto n = static_cast<int64_t>(lengths.size());
  const auto entry = [&](int64_t i) {
    return Entry{static_cast<int32_t>(lengths[static_cast<size_t>(i)]), static_cast<int32_t>(i)};
  };
  Random random(options.seed);
  Large<Entry> entries(lengths.size());
  Large<Entry> scratch;
  if (options.pool == 0) {
    // What a shuffle before the sort would leave of itself is the order of equal lengths.
    sort_by_length(entry, entries.data(), n, scratch);
    if (options.shuffle) shuffle_equals(entries, random);
  } else {
    for (int64_t i = 0; i < n; ++i) entries[static_cast<size_t>(i)] = entry(i);
    if (options.shuffle) shuffle_large(entries.data(), entries.size(), random);
    Large<Entry> copy;
    for (int64_t i = 0; options.pool > 1 && i < n; i += options.pool) {
      sort_pool(entries.data() + i, std::min(options.pool, n - i), scratch, copy);
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
  int64_t length = 0;
  int64_t tokens = 0;  // of that length
  const auto close = [&](int64_t next) {
    if (batch.end > batch.begin) batches.push_back(batch);
    batch = {next, next};
    longest = 0;
    sum = 0;
  };
  for (int64_t i = 0; i < n; ++i) {
    if (entries[static_cast<size_t>(i)].length != length) {
      length = entries[static_cast<size_t>(i)].length;
      tokens = (length + multiple - 1) / multiple * multiple;
    }
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
  if (options.shuffle) shuffle_large(batches.data(), batches.size(), random);

  Plan plan;
  int64_t total = 0;
  for (const Range& range : batches) total += range.end - range.begin;
  plan.samples.resize(static_cast<size_t>(total));
  plan.starts.resize(batches.size() + 1);
  int32_t* out = plan.samples.data();
  plan.starts[0] = 0;
  for (size_t b = 0; b < batches.size(); ++b) {
    for (int64_t i = batches[b].begin; i < batches[b].end; ++i) {
      *out++ = entries[static_cast<size_t>(i)].sample;
    }
    plan.starts[b + 1] = out - plan.samples.data();
  }
  return plan;
}

}  // namespace batchops::collate
