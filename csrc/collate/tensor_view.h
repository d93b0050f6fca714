// What is read of a tensor that Python holds. The torch binding fills it in, since it alone knows
// how this torch lays out its objects; the collator reads it and knows no torch.
#pragma once
#include <cstdint>

namespace batchops::collate {

struct TensorView {
  const void* data = nullptr;
  const int64_t* sizes = nullptr;    // in items; both alive as long as the tensor is not resized
  const int64_t* strides = nullptr;  // in items
  int64_t dim = 0;
  int32_t dtype = -1;  // equal for equal dtypes, otherwise without meaning
  int32_t item_bytes = 0;
};

// False where the tensor is more than bytes with strides in host memory.
using ReadTensor = bool (*)(void* object, TensorView* view);

// How often torch counted a write to the tensor; negative where it would not count one, or where
// one would move the memory (copy on write).
using CountWrites = int64_t (*)(void* object);

// Asks for the memory that reading it will touch: the tensor's, then (the tensor being there) its
// storage's.
using PrefetchTensor = void (*)(void* object);

// A tensor on memory that is not torch's, of its type exactly: may be resized as torch's own.
using LetGrow = void (*)(void* object);

// Calls work(argument) in `threads` threads of torch's, the caller among them, and returns when all
// have returned.
using RunOnTeam = void (*)(int32_t threads, void (*work)(void*), void* argument);

}  // namespace batchops::collate
