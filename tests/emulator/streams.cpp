#include "streams.h"

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "settings.h"

struct CUstream_st {
  bool blocking = true;
  uint64_t last = 0;  // work, by number
};

struct CUevent_st {
  uint64_t after = 0;  // work that it comes after, 0 when never recorded
};

namespace cuda_emulator {
namespace {

struct Work {
  std::vector<uint64_t> after;
  std::function<void()> run;
};

struct Queue {
  std::map<uint64_t, Work> pending;  // by number, in the order of issue
  uint64_t issued = 0;
  CUstream_st legacy;
  CUstream_st per_thread;
  std::set<CUstream_st*> streams;  // that exist
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

template <class F>
void for_each_blocking(F&& f) {
  f(queue().per_thread);
  for (CUstream_st* stream : queue().streams) {
    if (stream->blocking) f(*stream);
  }
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
  const std::function<void()> work = std::move(q.pending.at(chosen).run);
  q.pending.erase(chosen);
  work();
}

void finish(uint64_t number) {
  while (queue().pending.contains(number)) run_one();
}

cudaError_t issue(CUstream_st* stream, std::vector<uint64_t> also_after,
                  std::function<void()> work) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  Queue& q = queue();
  Work next{std::move(also_after), std::move(work)};
  next.after.push_back(stream->last);
  if (stream == &q.legacy) {
    for_each_blocking([&](const CUstream_st& other) { next.after.push_back(other.last); });
  } else if (stream->blocking) {
    next.after.push_back(q.legacy.last);
  }
  stream->last = ++q.issued;
  q.pending.emplace(stream->last, std::move(next));
  if (settings().order == Order::forward) finish(stream->last);
  return cudaSuccess;
}

}  // namespace

cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
  return issue(find(stream), {}, std::move(work));
}

void synchronize() {
  while (!queue().pending.empty()) run_one();
}

void forget_work() { queue().pending.clear(); }

}  // namespace cuda_emulator

using cuda_emulator::find;
using cuda_emulator::queue;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st{(flags & cudaStreamNonBlocking) == 0};
  queue().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

// What was issued to it still runs.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (queue().streams.erase(stream) == 0) return cudaErrorInvalidResourceHandle;
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const CUstream_st* known = find(stream);
  if (known == nullptr) return cudaErrorInvalidResourceHandle;
  cuda_emulator::finish(known->last);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const CUstream_st* known = find(stream);
  if (known == nullptr) return cudaErrorInvalidResourceHandle;
  if (!queue().pending.contains(known->last)) return cudaSuccess;
  cuda_emulator::run_one();  // or whoever asks again and again would ask for ever
  return queue().pending.contains(known->last) ? cudaErrorNotReady : cudaSuccess;
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
  const cudaError_t error = cuda_emulator::submit(stream, [] {});
  if (error == cudaSuccess) event->after = find(stream)->last;
  return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cuda_emulator::finish(event->after);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!queue().pending.contains(event->after)) return cudaSuccess;
  cuda_emulator::run_one();
  return queue().pending.contains(event->after) ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return cuda_emulator::issue(find(stream), {event->after}, [] {});
}

}  // extern "C"
