// Where group norm's parts lie, for tensors far larger than memory: the kernels' own cutting and
// walking of parts, with no tensor behind it.
#include "control.h"
#include "kernels/cuda/group_norm_launch.cuh"
#include "kernels/cuda/group_norm_walks.cuh"

using namespace batchops;
using namespace batchops::cuda;
using namespace batchops::cuda::group;

namespace {

struct Entry {
  int64_t first, end;  // elements of the tensor: in slices all of them, in pixels of the tile
  int64_t group, groups, channel, first_sum, mask_row;
};

__global__ void __launch_bounds__(kBlock)
    slices_places(const __grid_constant__ Cut cut, int64_t piece, Entry* out) {
  const Slices part(cut, piece);
  if (threadIdx.x == 0) {
    *out = {part.base + part.begin, part.base + part.end, part.first_group, part.groups,
            part.channel_of(0),     part.first_sum,       part.mask_row};
  }
}

__global__ void __launch_bounds__(kBlock)
    pixels_places(const __grid_constant__ Cut cut, int64_t piece, Entry* out) {
  const Pixels part(cut, piece);
  if (threadIdx.x == 0) {
    *out = {part.offset(0, 0),   part.offset(part.rows - 1, part.channels - 1) + 1,
            part.first_group,    part.groups,
            part.channel_of(0),  part.first_sum,
            part.mask_byte(0, 0)};
  }
}

}  // namespace

// info: pieces, pixels, parts of a group.
EMULATOR_EXPORT int emulated_group_places(const GroupNormShape* shape, int width, bool backward,
                                          bool mask, int64_t piece, Entry* out, int64_t* info,
                                          char* text, size_t size) {
  return cuda_emulator::guarded(text, size, [&]() -> const char* {
    Device found;
    if (const char* error = query("places", 0, found)) return error;
    const Purpose purpose{backward ? 2 : 1, 4, backward, mask};
    const Cut cut = make_cut(*shape, purpose, width, found);
    info[0] = cut.pieces;
    info[1] = cut.pixels;
    info[2] = cut.parts;
    const int64_t index = piece < 0 ? cut.pieces + piece : piece;
    return launch("places", cut.pixels ? pixels_places : slices_places, 1, kBlock, 0, nullptr, cut,
                  index, out);
  });
}
