// Random batches from several threads through one pool: waited for, cancelled and dropped at any
// moment; every kind of task on heap buffers of the exact size; slots from several threads. Built
// with sanitizers by test_data.py; prints "ok".
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "collate/gather_task.h"
#include "collate/joined_task.h"
#include "collate/normalize_task.h"
#include "collate/pad_task.h"
#include "collate/plan.h"
#include "collate/ring.h"
#include "collate/stack_task.h"

using namespace batchops::collate;

namespace {

constexpr int64_t kRows = 500;

#define REQUIRE(condition)                                         \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

struct Source {
  explicit Source(int64_t row_bytes, int64_t padding) : stride(row_bytes + padding) {
    bytes.resize(static_cast<size_t>(kRows * stride));
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<std::byte>(i * 2654435761u >> 7);
    column = Column::make(bytes.data(), kRows, stride, 1, {row_bytes}, {1});
  }
  int64_t stride;
  std::vector<std::byte> bytes;
  Column column;
};

void stress(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  const Source wide(3000, 8);
  const Source word(8, 0);
  const auto table = std::make_shared<const Table>(Table{wide.column, word.column});
  for (int round = 0; round < rounds; ++round) {
    // Heap buffers that go right after: a late write is a use after free.
    auto rows = std::make_shared<std::vector<int64_t>>(1 + random() % 400);
    for (int64_t& row : *rows) row = static_cast<int64_t>(random() % kRows);
    std::vector<std::byte> out_wide(rows->size() * 3000);
    std::vector<std::byte> out_word(rows->size() * 8);
    auto task = GatherTask::make(table, rows, {out_wide.data(), out_word.data()},
                                 1 + static_cast<int>(random() % 4));
    ThreadPool& pool = ThreadPool::instance();
    const unsigned fate = random() % 8;
    if (fate != 0) pool.submit(task);
    if (fate == 1 || fate == 2) {
      pool.cancel(*task);
      if (fate == 2) pool.cancel(*task);
      continue;
    }
    if (fate == 3) std::this_thread::yield();
    pool.wait(*task);
    REQUIRE(task->done());
    for (size_t i = 0; i < rows->size(); ++i) {
      const auto row = static_cast<size_t>((*rows)[i]);
      REQUIRE(std::memcmp(&out_wide[i * 3000], &wide.bytes[row * 3008], 3000) == 0);
      REQUIRE(std::memcmp(&out_word[i * 8], &word.bytes[row * 8], 8) == 0);
    }
  }
}

void run(const std::shared_ptr<Task>& task) {
  ThreadPool::instance().submit(task);
  ThreadPool::instance().wait(*task);
  REQUIRE(task->done());
}

// Samples of (length, 3) items, every third one strided, in memory of their own.
struct Ragged {
  Ragged(std::mt19937& random, int64_t item_bytes, int64_t count, int64_t longest) {
    blocks->item_bytes = item_bytes;
    for (int64_t i = 0; i < count; ++i) {
      const auto length = static_cast<int64_t>(random() % static_cast<unsigned>(longest + 1));
      const int64_t sizes[] = {length, 3};
      const int64_t pitch = item_bytes * (i % 3 == 2 ? 5 : 3);
      const int64_t strides[] = {pitch, item_bytes};
      memory.emplace_back(static_cast<size_t>(length * pitch));
      for (std::byte& byte : memory.back()) byte = static_cast<std::byte>(random());
      REQUIRE(blocks->add(memory.back().data(), sizes, strides, 2, true) == Blocks::Added::ok);
      lengths.push_back(length);
      pitches.push_back(pitch);
    }
  }
  const std::byte* at(size_t i, int64_t step) const { return memory[i].data() + step * pitches[i]; }
  std::shared_ptr<Blocks> blocks = std::make_shared<Blocks>();
  std::vector<std::vector<std::byte>> memory;
  std::vector<int64_t> lengths;
  std::vector<int64_t> pitches;
};

void pad_and_pack(unsigned seed) {
  std::mt19937 random(seed);
  for (const int64_t item : {1, 2, 4, 8, 16}) {
    const auto count = static_cast<int64_t>(1 + random() % 60);
    const Ragged ragged(random, item, count, 200);
    const int64_t step = 3 * item;
    const int64_t width = 200;
    const auto cells = static_cast<size_t>(count * width);
    Item fill{};
    fill[0] = std::byte{7};
    std::vector<std::byte> values(cells * static_cast<size_t>(step));
    std::vector<std::byte> labels(values.size());
    std::vector<std::byte> mask(cells);
    std::vector<int64_t> positions(cells);
    std::vector<int64_t> lengths(static_cast<size_t>(count));
    const bool left = random() % 2 == 0;
    run(PadTask::make(
        ragged.blocks,
        {values.data(), labels.data(), mask.data(), 1, positions.data(), lengths.data()}, width,
        left, fill, fill, 2));
    int64_t total = 0;
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      REQUIRE(lengths[i] == ragged.lengths[i]);
      total += lengths[i];
      const int64_t before = left ? width - lengths[i] : 0;
      for (int64_t k = 0; k < width; ++k) {
        const size_t cell = i * static_cast<size_t>(width) + static_cast<size_t>(k);
        const bool inside = k >= before && k < before + lengths[i];
        REQUIRE(mask[cell] == std::byte{inside});
        REQUIRE(positions[cell] == (inside ? k - before : 0));
        const std::byte* const value = &values[cell * static_cast<size_t>(step)];
        REQUIRE(std::memcmp(value, &labels[cell * static_cast<size_t>(step)],
                            static_cast<size_t>(step)) == 0);
        if (inside) {
          REQUIRE(std::memcmp(value, ragged.at(i, k - before), static_cast<size_t>(step)) == 0);
        } else {
          REQUIRE(value[0] == std::byte{7} && value[step - item] == std::byte{7});
        }
      }
    }
    std::vector<std::byte> flat(static_cast<size_t>(total * step));
    std::vector<std::byte> again(flat.size());
    std::vector<int32_t> offsets(static_cast<size_t>(count) + 1);
    run(PackTask::make(ragged.blocks, {flat.data(), nullptr, nullptr, nullptr, offsets.data()},
                       fill, 2));
    REQUIRE(offsets.back() == total);
    // The same from a stack of ragged samples, as one of two joined tasks.
    std::vector<std::byte> twice(flat.size());
    run(JoinedTask::make({StackTask::make(ragged.blocks, again.data(), 2),
                          StackTask::make(ragged.blocks, twice.data(), 2)},
                         2));
    REQUIRE(flat == again && flat == twice);
  }
}

void normalize(unsigned seed) {
  std::mt19937 random(seed);
  for (const int64_t channels : {1, 2, 3, 5}) {
    for (const FloatType type : {FloatType::fp32, FloatType::bf16, FloatType::fp16}) {
      const auto pixels = static_cast<int64_t>(1 + random() % 400);
      auto blocks = std::make_shared<Blocks>();
      blocks->item_bytes = 1;
      std::vector<std::vector<std::byte>> images(3);
      const int64_t sizes[] = {pixels * channels};
      const int64_t strides[] = {1};
      for (auto& image : images) {
        image.resize(static_cast<size_t>(pixels * channels));
        for (std::byte& byte : image) byte = static_cast<std::byte>(random());
        blocks->add(image.data(), sizes, strides, 1, false);
      }
      Pixels plan;
      plan.channels = channels;
      plan.pixels = pixels;
      plan.channels_last_in = random() % 2 == 0;
      plan.channels_last_out = random() % 2 == 0;
      plan.type = type;
      plan.scale.assign(static_cast<size_t>(channels), 2.0f);
      plan.shift.assign(static_cast<size_t>(channels), -1.0f);
      const size_t item = type == FloatType::fp32 ? 4 : 2;
      std::vector<std::byte> out(3 * images[0].size() * item);
      run(NormalizeTask::make(blocks, plan, out.data(), 2));
      if (type != FloatType::fp32) continue;
      for (size_t i = 0; i < 3; ++i) {
        for (int64_t p = 0; p < pixels; ++p) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t from = plan.channels_last_in ? p * channels + c : c * pixels + p;
            const int64_t to = plan.channels_last_out ? p * channels + c : c * pixels + p;
            float value;
            std::memcpy(&value, &out[(i * images[0].size() + static_cast<size_t>(to)) * 4], 4);
            REQUIRE(value == 2.0f * static_cast<float>(std::to_integer<int>(
                                        images[i][static_cast<size_t>(from)])) -
                                 1.0f);
          }
        }
      }
    }
  }
}

// Leases from several threads: no slot is given to two at a time, and nothing is lost.
void share_slots() {
  Ring ring(std::make_unique<PageMemory>(), size_t{64} << 20, true);
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < 4; ++k) {
    threads.emplace_back([&ring, k] {
      std::mt19937 random(k);
      for (int round = 0; round < 300; ++round) {
        const size_t bytes = 5000 + random() % 200000;
        Ring::Slot* const slot = ring.acquire(bytes);
        if (slot == nullptr) continue;
        REQUIRE(Ring::size(slot) >= bytes);
        std::memset(Ring::data(slot), static_cast<int>(k), bytes);
        if (random() % 4 == 0) std::this_thread::yield();
        for (size_t i = 0; i < bytes; i += 997) {
          REQUIRE(Ring::data(slot)[i] == static_cast<std::byte>(k));
        }
        const bool in_flight = random() % 3 == 0;
        ring.release(slot, in_flight);
        if (in_flight) ring.landed(slot);
        if (round % 100 == 99) ring.trim();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const RingStats stats = ring.stats();
  REQUIRE(stats.leased == 0 && stats.in_flight == 0 && stats.leased_bytes == 0);
}

// One, two and three digits to sort by, one length for all; sorted whole and in pools.
void plan(int32_t longest_length, int64_t pool) {
  std::vector<int64_t> lengths(150000);
  std::mt19937 random(3);
  for (int64_t& length : lengths) length = static_cast<int64_t>(random()) % longest_length;
  PlanOptions options;
  options.max_tokens = 2 * int64_t{longest_length};
  options.pool = pool;
  const Plan made = plan_batches(lengths, options);
  std::vector<bool> seen(lengths.size());
  for (size_t b = 0; b + 1 < made.starts.size(); ++b) {
    int64_t longest = 0;
    int64_t before = longest_length;
    for (int64_t i = made.starts[b]; i < made.starts[b + 1]; ++i) {
      const auto sample = static_cast<size_t>(made.samples[static_cast<size_t>(i)]);
      REQUIRE(!seen[sample]);
      seen[sample] = true;
      longest = std::max(longest, lengths[sample]);
      REQUIRE(pool > 0 || lengths[sample] <= before);
      before = lengths[sample];
    }
    REQUIRE(longest * (made.starts[b + 1] - made.starts[b]) <= options.max_tokens);
  }
  REQUIRE(made.samples.size() == lengths.size());
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < 4; ++k) threads.emplace_back([k] { stress(k, 150); });
  for (std::thread& thread : threads) thread.join();
  for (unsigned seed = 0; seed < 3; ++seed) {
    pad_and_pack(seed);
    normalize(seed);
  }
  share_slots();
  for (const int32_t longest : {1, 2000, 5000, 1 << 30}) {
    for (const int64_t pool : {0, 7, 4096}) plan(longest, pool);
  }
#if !defined(__SANITIZE_THREAD__)  // which does not follow threads into a forked child
  const pid_t child = fork();
  if (child == 0) {
    stress(99, 20);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  REQUIRE(status == 0);
#endif
  ThreadPool::instance().shutdown();
  stress(100, 20);
  REQUIRE(ThreadPool::instance().threads() == 0);
  std::puts("ok");
}
