// Bytes of global memory that each launch reads and writes, by buffer, and the 32-byte sectors that
// its warps touch.
//
// Lanes run one after another here, so which accesses make one warp instruction is worked out
// afterwards: those of the same warp, at the same code address, for the n-th time since the lanes
// last met. A lane that skips one turn of a loop that its neighbours take is out of step with them
// until then, and counts as sectors of its own.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "access.h"
#include "observer.h"

namespace cuda_emulator {

// Of one buffer in one launch.
struct Flow {
  uint64_t bytes = 0;     // all that the threads ask for
  uint64_t distinct = 0;  // each byte once in a warp instruction
  uint64_t sectors = 0;   // of 32 bytes, each once in a warp instruction
};

struct Launch {
  std::string kernel;
  uint64_t blocks = 0;  // 0 where no thread runs
  unsigned cluster = 1;
  struct Buffer {
    unsigned region;
    Flow read, written;
  };
  std::vector<Buffer> buffers = {};

  Buffer& of(unsigned region);
};

class Traffic {
 public:
  void begin(const GridEvent& grid);
  void end();
  void block_ends(uint64_t block) { count_sectors(blocks_[block]); }
  void lanes_met(uint64_t block, unsigned warp, unsigned lanes);
  void access(const Access& access);
  // One that no thread makes: a memset, a copy of buffers.
  void operation(const std::string& name, Region* region, size_t offset, size_t bytes, bool write);

  const std::vector<Launch>& launches() const { return launches_; }

 private:
  static constexpr unsigned kSector = 32;

  // What one lane touches of one sector. `instruction` orders by warp, meeting, turn and code.
  struct Touch {
    uint64_t instruction;
    uint64_t sector;  // address / 32, and whether it is written in the lowest bit
    uint32_t bytes;   // a bit each
    uint32_t region;
  };
  struct Turn {
    uint32_t meeting = 0;
    uint32_t count = 0;
  };
  struct BlockState {
    std::vector<uint32_t> meeting;         // of each thread: its last one
    std::vector<uint32_t> meetings;        // of each warp, so far
    std::vector<std::vector<Turn>> turns;  // by site, then thread
    std::vector<Touch> touches;
  };

  void count_bytes(const Access& access);
  void count_sectors(BlockState& block);

  unsigned threads_ = 0;
  std::vector<BlockState> blocks_;
  std::vector<Launch> launches_;
};

}  // namespace cuda_emulator
