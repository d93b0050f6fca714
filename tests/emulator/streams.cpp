#include "streams.h"

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "host_call.h"
#include "observer.h"
#include "settings.h"

namespace cuda_emulator {
namespace {

// Work, by number, and what is over when it is. 0 is no work.
struct Point {
  uint64_t work = 0;
  WorkClock after;
};

}  // namespace
}  // namespace cuda_emulator

struct CUstream_st {
  bool blocking = true;
  uint32_t number = 0;
  cuda_emulator::Point last;
};

struct CUevent_st {
  cuda_emulator::Point point;  // of its last record
};

namespace cuda_emulator {
namespace {

struct Work {
  std::vector<uint64_t> after;
  WorkOrder order;
  std::function<void()> run;
};

struct Queue {
  std::map<uint64_t, Work> pending;  // by number, in the order of issue
  uint64_t issued = 0;
  uint32_t streams_made = 2;
  CUstream_st legacy{true, 0, {}};
  CUstream_st per_thread{true, 1, {}};
  std::set<CUstream_st*> streams;  // that exist
  std::vector<Point> ended;        // the last work of blocking streams that do not
  WorkOrder running;
  WorkClock all;   // that has been issued
  WorkClock host;  // that the host has waited for
};

Queue& queue() {
  static Queue instance;
  return instance;
}

// Null for a handle that no stream has.
CUstream_st* find(cudaStream_t handle) {
  Queue& q = queue();
  if (handle == nullptr || handle == cudaStreamLegacy) return &q.legacy;
  if (handle == cudaStreamPerThread) return &q.per_thread;
  return q.streams.contains(handle) ? handle : nullptr;
}

cudaError_t no_stream(const std::string& call) {
  return refuse_call(cudaErrorInvalidResourceHandle, call, "the stream does not exist");
}

bool is_free(const Work& work) {
  for (uint64_t other : work.after) {
    if (queue().pending.contains(other)) return false;
  }
  return true;
}

// One piece of work whose predecessors have run.
void run_one() {
  Queue& q = queue();
  std::vector<uint64_t> ready;
  for (const auto& [number, work] : q.pending) {
    if (is_free(work)) ready.push_back(number);
  }
  uint64_t chosen = ready.front();
  if (settings().order == Order::reverse) chosen = ready.back();
  if (settings().order == Order::random) chosen = ready[random_below(ready.size())];
  const Work work = std::move(q.pending.at(chosen));
  q.pending.erase(chosen);
  q.running = work.order;
  work.run();
}

void finish(uint64_t number) {
  while (queue().pending.contains(number)) run_one();
}

// The host knows that this is over.
void host_saw(const WorkClock& over) {
  Queue& q = queue();
  add(q.host, over);
  if (q.host != q.all) return;
  q.ended.clear();
  if (auto* o = observer()) o->host_waited();
}

void host_waits(const Point& point) {
  finish(point.work);
  host_saw(point.after);
}

// Whether the host finds it over. Whoever asks again and again must not ask for ever.
cudaError_t host_asks(const Point& point) {
  if (queue().pending.contains(point.work)) run_one();
  if (queue().pending.contains(point.work)) return cudaErrorNotReady;
  host_saw(point.after);
  return cudaSuccess;
}

void issue(CUstream_st& stream, const Point& also_after, std::function<void()> work) {
  Queue& q = queue();
  Work next{{}, {stream.number, ++q.issued, q.host}, std::move(work)};
  const auto comes_after = [&](const Point& point) {
    next.after.push_back(point.work);
    add(next.order.after, point.after);
  };
  comes_after(also_after);
  comes_after(stream.last);
  if (&stream == &q.legacy) {
    comes_after(q.per_thread.last);
    for (const CUstream_st* other : q.streams) {
      if (other->blocking) comes_after(other->last);
    }
    for (const Point& point : q.ended) comes_after(point);
  } else if (stream.blocking) {
    comes_after(q.legacy.last);
  }
  next.order.after[stream.number] = q.issued;
  q.all[stream.number] = q.issued;
  stream.last = {q.issued, next.order.after};
  q.pending.emplace(q.issued, std::move(next));
  if (settings().order == Order::forward) finish(stream.last.work);
}

}  // namespace

cudaError_t submit(const std::string& call, cudaStream_t handle, std::function<void()> work) {
  CUstream_st* stream = find(handle);
  if (stream == nullptr) return no_stream(call);
  issue(*stream, {}, std::move(work));
  return cudaSuccess;
}

void synchronize() {
  while (!queue().pending.empty()) run_one();
  host_saw(queue().all);
}

void forget_work() {
  queue().pending.clear();
  host_saw(queue().all);
}

const WorkOrder& running_work() { return queue().running; }

}  // namespace cuda_emulator

using cuda_emulator::find;
using cuda_emulator::no_stream;
using cuda_emulator::queue;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st{(flags & cudaStreamNonBlocking) == 0, queue().streams_made++, {}};
  queue().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

// What was issued to it still runs, in its place among the others.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (queue().streams.erase(stream) == 0) return no_stream(__func__);
  if (stream->blocking) queue().ended.push_back(stream->last);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const CUstream_st* known = find(stream);
  if (known == nullptr) return no_stream(__func__);
  cuda_emulator::host_waits(known->last);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const CUstream_st* known = find(stream);
  return known == nullptr ? no_stream(__func__) : cuda_emulator::host_asks(known->last);
}

cudaError_t cudaDeviceSynchronize() {
  cuda_emulator::synchronize();
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const cudaError_t error = cuda_emulator::submit(__func__, stream, [] {});
  if (error == cudaSuccess) event->point = find(stream)->last;
  return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cuda_emulator::host_waits(event->point);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cuda_emulator::host_asks(event->point); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  CUstream_st* known = find(stream);
  if (known == nullptr) return no_stream(__func__);
  cuda_emulator::issue(*known, event->point, [] {});
  return cudaSuccess;
}

}  // extern "C"
