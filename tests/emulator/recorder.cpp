#include "recorder.h"

#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>
#include <memory>

#include "control.h"

namespace cuda_emulator {

Recorder* the_recorder = nullptr;

Recorder::Recorder(bool traffic, bool races) : count_traffic_(traffic), find_races_(races) {
  sites_.emplace(nullptr, 0);  // the host
  the_recorder = this;
  the_observer = this;
}

Recorder::~Recorder() {
  the_recorder = nullptr;
  the_observer = nullptr;
}

unsigned Recorder::site(const void* code) {
  if (code == last_code_) return last_site_;
  const auto number = static_cast<unsigned>(sites_.size());
  last_site_ = sites_.try_emplace(code, number).first->second;
  last_code_ = code;
  return last_site_;
}

template <class F>
void Recorder::with_access(const void* data, size_t bytes, bool reads, bool writes,
                           const void* code, F&& take) {
  if (bytes == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  Region* region = memory_.find(address);
  if (region == nullptr) return;
  const auto offset = static_cast<int64_t>(address - region->begin);
  const auto size = static_cast<int64_t>(region->bytes);
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > size) {
    if (region->guard > 0 && outside_.size() < kMostOutside) {
      outside_.push_back({kernel_, region->name, offset, bytes, writes, place_, code});
    }
    return;
  }
  take(Access{place_, region, static_cast<size_t>(offset), bytes, reads, writes, Kind::plain,
              Scope::device, code, site(code)});
}

void Recorder::touch(const void* data, size_t bytes, bool reads, bool writes, const void* code) {
  if (!running_) return;
  with_access(data, bytes, reads, writes, code, [&](const Access& access) {
    if (count_traffic_) traffic_.access(access);
    if (find_races_) races_.access(access);
  });
}

void Recorder::touch_atomic(const AtomicEvent& event) {
  if (!running_) return;
  with_access(event.address, event.bytes, event.reads, event.writes, event.code,
              [&](Access access) {
                access.kind = Kind::atomic;
                access.scope = event.scope;
                if (count_traffic_) traffic_.access(access);
                if (!find_races_) return;
                races_.access(access);
                races_.atomic(place_, event);
              });
}

void Recorder::grid_starts(const GridEvent& grid) {
  kernel_ = grid.kernel;
  threads_ = grid.threads;
  if (count_traffic_) traffic_.begin(grid);
  if (find_races_) races_.begin(grid);
}

void Recorder::grid_ends() {
  running_ = false;
  if (count_traffic_) traffic_.end();
  if (find_races_) races_.end();
  memory_.remove_shared();
}

void Recorder::block_ends(uint64_t block) {
  if (count_traffic_) traffic_.block_ends(block);
  memory_.remove_block(block);
}

void Recorder::shared_memory(uint64_t block, const char* name, const void* data, size_t bytes) {
  memory_.add(name, data, bytes, 0, block);
}

void Recorder::thread_runs(uint64_t block, unsigned thread) {
  place_ = {block, thread};
  running_ = true;
}

void Recorder::barrier_released(uint64_t block, std::span<const unsigned> threads) {
  if (count_traffic_) {
    for (size_t i = 0; i < threads.size();) {
      const unsigned warp = threads[i] / kWarpLanes;
      unsigned lanes = 0;
      for (; i < threads.size() && threads[i] / kWarpLanes == warp; ++i) {
        lanes |= 1u << threads[i] % kWarpLanes;
      }
      traffic_.lanes_met(block, warp, lanes);
    }
  }
  if (find_races_) races_.barrier(block, threads);
}

void Recorder::warp_released(uint64_t block, unsigned warp, unsigned lanes, bool orders_memory) {
  if (count_traffic_) traffic_.lanes_met(block, warp, lanes);
  if (find_races_ && orders_memory) races_.warp_sync(block, warp, lanes);
}

void Recorder::blocks_released(std::span<const uint64_t> blocks) {
  if (count_traffic_) {
    for (const uint64_t block : blocks) {
      for (unsigned warp = 0; warp * kWarpLanes < threads_; ++warp) {
        traffic_.lanes_met(block, warp, ~0u);
      }
    }
  }
  if (find_races_) races_.blocks_sync(blocks);
}

void Recorder::arrives(const void* object) {
  if (find_races_ && running_) races_.arrives(place_, object);
}

void Recorder::waited(const void* object) {
  if (find_races_ && running_) races_.waited(place_, object);
}

void Recorder::fence(Scope scope) {
  if (find_races_ && running_) races_.fence(place_, scope);
}

void Recorder::copy_issued(const CopyEvent& copy) {
  const auto take = [&](const Access& access) {
    if (count_traffic_) traffic_.access(access);
    if (find_races_) races_.copy_access(access, copy.id);
  };
  with_access(copy.from, copy.bytes, true, false, copy.code, take);
  with_access(copy.to, copy.bytes + copy.zeros, false, true, copy.code, take);
}

void Recorder::copy_completed(uint64_t id, const void* object) {
  if (find_races_) races_.copy_completed(place_, id, object);
}

void Recorder::memory_operation(void* to, const void* from, size_t bytes, const WorkOrder& order) {
  const char* name = from == nullptr ? "cudaMemsetAsync" : "cudaMemcpyAsync";
  kernel_ = name;
  place_ = {};
  if (find_races_) races_.begin_operation(name, order);
  const auto take = [&](const Access& access) {
    if (!access.region->global()) return;
    if (count_traffic_) {
      traffic_.operation(name, access.region, access.offset, access.bytes, access.writes);
    }
    if (find_races_) races_.access(access);
  };
  if (from != nullptr) with_access(from, bytes, true, false, nullptr, take);
  with_access(to, bytes, false, true, nullptr, take);
  if (find_races_) races_.end();
}

// ---- the report

namespace {

class Json {
 public:
  void key(const char* name) {
    comma();
    quote(name);
    text_ += ':';
    fresh_ = true;
  }
  void value(const std::string& text) {
    comma();
    quote(text);
  }
  void value(int64_t number) {
    comma();
    text_ += std::to_string(number);
  }
  void open(char bracket) {
    comma();
    text_ += bracket;
    fresh_ = true;
  }
  void close(char bracket) {
    text_ += bracket;
    fresh_ = false;
  }
  template <class T>
  void field(const char* name, const T& what) {
    key(name);
    if constexpr (std::is_convertible_v<T, std::string>) {
      value(std::string(what));
    } else {
      value(static_cast<int64_t>(what));
    }
  }
  std::string take() { return std::move(text_); }

 private:
  void comma() {
    if (!fresh_) text_ += ',';
    fresh_ = false;
  }
  void quote(const std::string& text) {
    text_ += '"';
    for (const char c : text) {
      if (c == '"' || c == '\\') text_ += '\\';
      text_ += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    text_ += '"';
  }

  std::string text_;
  bool fresh_ = true;
};

// Where in this library the instruction before a return address lies.
int64_t code_offset(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return -1;
  return static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
}

void put(Json& json, const char* name, const Flow& flow) {
  json.key(name);
  json.open('[');
  for (const uint64_t number : {flow.bytes, flow.distinct, flow.sectors}) {
    json.value(static_cast<int64_t>(number));
  }
  json.close(']');
}

void put(Json& json, Place place, const void* code) {
  json.field("block", place.block);
  json.field("thread", place.thread);
  json.field("code", code_offset(code));
}

void put(Json& json, const char* name, const RaceReport::Side& side) {
  json.key(name);
  json.open('{');
  json.field("what", side.copy ? std::string("asynchronous ") + side.what : side.what);
  put(json, side.place, side.code);
  json.close('}');
}

}  // namespace

std::string Recorder::report() const {
  Json json;
  json.open('{');
  json.key("buffers");
  json.open('[');
  for (const auto& region : memory_.global()) {
    json.open('{');
    json.field("region", region->index);
    json.field("name", region->name);
    json.field("bytes", region->bytes);
    json.close('}');
  }
  json.close(']');
  json.key("launches");
  json.open('[');
  for (const Launch& launch : traffic_.launches()) {
    json.open('{');
    json.field("kernel", launch.kernel);
    json.field("blocks", launch.blocks);
    json.field("cluster", launch.cluster);
    json.key("buffers");
    json.open('[');
    for (const Launch::Buffer& buffer : launch.buffers) {
      json.open('{');
      json.field("region", buffer.region);
      put(json, "read", buffer.read);
      put(json, "written", buffer.written);
      json.close('}');
    }
    json.close(']');
    json.close('}');
  }
  json.close(']');
  json.key("outside");
  json.open('[');
  for (const Outside& one : outside_) {
    json.open('{');
    json.field("kernel", one.kernel);
    json.field("buffer", one.buffer);
    json.field("offset", one.offset);
    json.field("bytes", one.bytes);
    json.field("what", one.write ? "write" : "read");
    put(json, one.place, one.code);
    json.close('}');
  }
  json.close(']');
  json.key("races");
  json.open('[');
  for (const RaceReport& race : races_.reports()) {
    json.open('{');
    json.field("kernel", race.kernel);
    json.field("buffer", race.buffer);
    json.field("offset", race.offset);
    json.field("why", race.why);
    put(json, "earlier", race.earlier);
    put(json, "later", race.later);
    json.close('}');
  }
  json.close(']');
  json.close('}');
  return json.take();
}

}  // namespace cuda_emulator

// ---- for Python

using namespace cuda_emulator;

namespace {
std::unique_ptr<Recorder> recorder;
std::string text;
}  // namespace

EMULATOR_EXPORT void emulator_record(bool traffic, bool races) {
  recorder.reset();
  recorder = std::make_unique<Recorder>(traffic, races);
}

EMULATOR_EXPORT void emulator_stop_recording() { recorder.reset(); }

EMULATOR_EXPORT void emulator_watch(const char* name, const void* data, size_t bytes,
                                    size_t guard) {
  if (recorder) recorder->memory().add(name, data, bytes, guard);
}

// Valid until the next call.
EMULATOR_EXPORT const char* emulator_recorded() {
  text = recorder ? recorder->report() : "{}";
  return text.c_str();
}

// How often each byte of the n-th watched buffer was read or written.
EMULATOR_EXPORT const uint16_t* emulator_times(size_t n, bool written) {
  const Region& region = *recorder->memory().global()[n];
  return written ? region.writes.data() : region.reads.data();
}
