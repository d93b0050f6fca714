// Work of two streams on the same memory, ordered by each of the means there are, and by none. Each
// kernel is sound by itself.
#include "race_faults.h"

using namespace race_faults;

namespace {

__global__ void produce(Data d) {
  d.partial[position()] = d.in[position()] + 1.0f;  // race: produced
}

__global__ void consume(Data d) {
  d.out[position()] = d.partial[position()] * 2.0f;  // race: used
}

__global__ void read_too(Data d) { d.out[position()] = d.in[position()]; }

__global__ void count(Data d) {
  atomicAdd(d.flags, 1u);  // race: counted in a stream
}
__global__ void count_in_block_scope(Data d) {
  atomicAdd_block(d.flags + blockIdx.x, 1u);  // race: counted in block scope
}
__global__ void reset(Data d) {
  if (position() == 0) d.flags[0] = 0;  // race: reset
}

using Kernel = void(Data);

// One kernel in a stream, one in another, and what is between them.
struct Case {
  const char* name;
  Kernel* first = produce;
  Kernel* second = consume;
  enum Order {
    nothing,
    event,
    early_event,
    other_event,
    host_waits_for_stream,
    host_waits_for_other_stream,
    host_waits_for_event,
    host_asks_for_event,
    host_waits_for_device,
    copy_to_host,
    third_stream
  } order = nothing;
  enum Streams {
    two,
    one,
    default_then_blocking,
    blocking_then_default,
    default_then_not_blocking,
    not_blocking_then_default,
    ended_then_default
  } streams = two;
  bool memset = false;  // of what the second reads, in place of the first kernel
};

const Case kCases[] = {
    {"one_stream", produce, consume, Case::nothing, Case::one},
    {"two_streams", produce, consume, Case::nothing},
    {"consumer_before_producer", consume, produce, Case::nothing},
    {"event", produce, consume, Case::event},
    {"event_before_the_work", produce, consume, Case::early_event},
    {"event_of_another_stream", produce, consume, Case::other_event},
    {"stream_waited_for", produce, consume, Case::host_waits_for_stream},
    {"other_stream_waited_for", produce, consume, Case::host_waits_for_other_stream},
    {"event_waited_for", produce, consume, Case::host_waits_for_event},
    {"event_asked_for", produce, consume, Case::host_asks_for_event},
    {"device_waited_for", produce, consume, Case::host_waits_for_device},
    {"copy_to_host", produce, consume, Case::copy_to_host},
    {"by_a_third_stream", produce, consume, Case::third_stream},
    {"default_then_blocking", produce, consume, Case::nothing, Case::default_then_blocking},
    {"blocking_then_default", produce, consume, Case::nothing, Case::blocking_then_default},
    {"default_then_not_blocking", produce, consume, Case::nothing, Case::default_then_not_blocking},
    {"not_blocking_then_default", produce, consume, Case::nothing, Case::not_blocking_then_default},
    {"ended_then_default", produce, consume, Case::nothing, Case::ended_then_default},
    {"both_read", produce, read_too},
    {"both_count", count, count},
    {"both_count_in_block_scope", count_in_block_scope, count_in_block_scope},
    {"count_and_reset", count, reset},
    {"memset_of_two_streams", nullptr, consume, Case::nothing, Case::two, true},
    {"memset_and_event", nullptr, consume, Case::event, Case::two, true},
};

struct Streams {
  cudaStream_t first = nullptr, second = nullptr, third = nullptr;
  cudaEvent_t event = nullptr;

  ~Streams() {
    cudaEventDestroy(event);
    for (cudaStream_t stream : {first, second, third}) {
      if (stream != nullptr) cudaStreamDestroy(stream);
    }
  }
};

// What comes between the two; null or a message.
const char* put_in_order(const Case& one, Streams& s, const Data& d) {
  cudaError_t error = cudaSuccess;
  const auto wait = [&](cudaStream_t recorded, cudaStream_t waiting) {
    error = cudaEventRecord(s.event, recorded);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(waiting, s.event, 0);
  };
  switch (one.order) {
    case Case::nothing:
      break;
    case Case::event:
      wait(s.first, s.second);
      break;
    case Case::early_event:  // recorded already
      error = cudaStreamWaitEvent(s.second, s.event, 0);
      break;
    case Case::other_event:
      wait(s.third, s.second);
      break;
    case Case::host_waits_for_stream:
      error = cudaStreamSynchronize(s.first);
      break;
    case Case::host_waits_for_other_stream:
      error = cudaStreamSynchronize(s.third);
      break;
    case Case::host_waits_for_event:
      error = cudaEventRecord(s.event, s.first);
      if (error == cudaSuccess) error = cudaEventSynchronize(s.event);
      break;
    case Case::host_asks_for_event:
      error = cudaEventRecord(s.event, s.first);
      while (error == cudaSuccess && cudaEventQuery(s.event) == cudaErrorNotReady) {
      }
      break;
    case Case::host_waits_for_device:
      error = cudaDeviceSynchronize();
      break;
    case Case::copy_to_host: {
      float value = 0.0f;
      error = cudaMemcpyAsync(&value, d.partial, sizeof value, cudaMemcpyDeviceToHost, s.first);
      if (error == cudaSuccess) error = cudaStreamSynchronize(s.first);
      break;
    }
    case Case::third_stream:
      wait(s.first, s.third);
      if (error == cudaSuccess) wait(s.third, s.second);
      break;
  }
  return check(one.name, "order", error);
}

const char* run_case(const Case& one, const Data& d, int blocks) {
  Streams s;
  const auto make = [](cudaStream_t* stream, bool blocking) {
    return cudaStreamCreateWithFlags(stream, blocking ? cudaStreamDefault : cudaStreamNonBlocking);
  };
  const auto kind = one.streams;
  const bool blocking = kind == Case::default_then_blocking ||
                        kind == Case::blocking_then_default || kind == Case::ended_then_default;
  const bool first_default =
      kind == Case::default_then_blocking || kind == Case::default_then_not_blocking;
  const bool second_default = kind == Case::blocking_then_default ||
                              kind == Case::not_blocking_then_default ||
                              kind == Case::ended_then_default;
  cudaError_t error = cudaEventCreate(&s.event);
  if (error == cudaSuccess) error = make(&s.third, false);
  if (error == cudaSuccess && !first_default) error = make(&s.first, blocking);
  if (error == cudaSuccess && !second_default) error = make(&s.second, blocking);
  if (error == cudaSuccess) error = cudaEventRecord(s.event, s.first);
  if (error == cudaSuccess && one.memset) {
    const size_t bytes = static_cast<size_t>(blocks) * kBlock * sizeof(float);
    error = cudaMemsetAsync(d.partial, 0, bytes, s.first);
  }
  if (const char* failed = check(one.name, "streams", error)) return failed;
  const cudaStream_t second = kind == Case::one ? s.first : s.second;
  if (!one.memset) {
    if (const char* failed = launch("first", one.first, blocks, kBlock, 0, s.first, d)) {
      return failed;
    }
  }
  if (kind == Case::ended_then_default) {
    cudaStreamDestroy(s.first);
    s.first = nullptr;
  }
  if (const char* failed = put_in_order(one, s, d)) return failed;
  return launch("second", one.second, blocks, kBlock, 0, second, d);
}

}  // namespace

EMULATOR_EXPORT int emulated_race_between_streams(const char* name, const Data* data, int blocks,
                                                  char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    for (const Case& one : kCases) {
      if (std::strcmp(one.name, name) == 0) return run_case(one, *data, blocks);
    }
    return "no such case";
  });
}
