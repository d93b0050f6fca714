#include "traffic.h"

#include <algorithm>
#include <bit>

namespace cuda_emulator {
namespace {

void count_up(std::vector<uint16_t>& times, size_t offset, size_t bytes) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (times[i] != 0xffff) ++times[i];
  }
}

}  // namespace

Launch::Buffer& Launch::of(unsigned region) {
  for (Buffer& buffer : buffers) {
    if (buffer.region == region) return buffer;
  }
  return buffers.emplace_back(Buffer{region, {}, {}});
}

void Traffic::begin(const GridEvent& grid) {
  launches_.push_back({grid.kernel, grid.blocks, grid.cluster_blocks});
  threads_ = grid.threads;
  blocks_.clear();
  blocks_.resize(grid.blocks);
}

void Traffic::end() {
  for (BlockState& block : blocks_) count_sectors(block);
  blocks_.clear();
}

void Traffic::lanes_met(uint64_t index, unsigned warp, unsigned lanes) {
  BlockState& block = blocks_[index];
  if (block.meeting.empty()) return;  // nothing to line up yet
  const uint32_t meeting = ++block.meetings[warp];
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const unsigned thread = warp * kWarpLanes + lane;
    if ((lanes >> lane & 1) && thread < threads_) block.meeting[thread] = meeting;
  }
}

void Traffic::count_bytes(const Access& access) {
  Launch::Buffer& buffer = launches_.back().of(access.region->index);
  if (access.reads) {
    buffer.read.bytes += access.bytes;
    count_up(access.region->reads, access.offset, access.bytes);
  }
  if (access.writes) {
    buffer.written.bytes += access.bytes;
    count_up(access.region->writes, access.offset, access.bytes);
  }
}

void Traffic::access(const Access& access) {
  if (!access.region->global()) return;
  count_bytes(access);

  BlockState& block = blocks_[access.place.block];
  if (block.meeting.empty()) {
    block.meeting.resize(threads_);
    block.meetings.resize((threads_ + kWarpLanes - 1) / kWarpLanes);
  }
  if (block.turns.size() <= access.site) block.turns.resize(access.site + 1);
  std::vector<Turn>& turns = block.turns[access.site];
  if (turns.empty()) turns.resize(threads_);
  const unsigned thread = access.place.thread;
  Turn& turn = turns[thread];
  if (turn.meeting != block.meeting[thread]) turn = {block.meeting[thread], 0};
  // 5 bits of warp, 11 of site, 24 of meeting, 24 of turn.
  const uint64_t instruction = uint64_t{access.place.warp()} << 59 |
                               uint64_t{access.site & 0x7ff} << 48 |
                               uint64_t{turn.meeting & 0xffffff} << 24 | (turn.count & 0xffffff);
  ++turn.count;

  uintptr_t at = access.region->begin + access.offset;
  const uintptr_t end = at + access.bytes;
  while (at < end) {
    const uintptr_t next = std::min<uintptr_t>(end, at / kSector * kSector + kSector);
    const auto length = static_cast<unsigned>(next - at);
    const uint32_t mask = (length == 32 ? ~0u : (1u << length) - 1) << (at % kSector);
    for (const bool write : {false, true}) {
      if (!(write ? access.writes : access.reads)) continue;
      block.touches.push_back({instruction, at / kSector << 1 | write, mask, access.region->index});
    }
    at = next;
  }
}

void Traffic::count_sectors(BlockState& block) {
  std::vector<Touch>& touches = block.touches;
  std::sort(touches.begin(), touches.end(), [](const Touch& a, const Touch& b) {
    return a.instruction != b.instruction ? a.instruction < b.instruction : a.sector < b.sector;
  });
  for (size_t i = 0; i < touches.size();) {
    const Touch& first = touches[i];
    uint32_t bytes = 0;
    for (; i < touches.size() && touches[i].instruction == first.instruction &&
           touches[i].sector == first.sector;
         ++i) {
      bytes |= touches[i].bytes;
    }
    Launch::Buffer& buffer = launches_.back().of(first.region);
    Flow& flow = first.sector & 1 ? buffer.written : buffer.read;
    ++flow.sectors;
    flow.distinct += static_cast<uint64_t>(std::popcount(bytes));
  }
  block = {};
}

void Traffic::operation(const std::string& name, Region* region, size_t offset, size_t bytes,
                        bool write) {
  if (launches_.empty() || launches_.back().kernel != name) launches_.push_back({name});
  Launch::Buffer& buffer = launches_.back().of(region->index);
  Flow& flow = write ? buffer.written : buffer.read;
  const uintptr_t at = region->begin + offset;
  flow.bytes += bytes;
  flow.distinct += bytes;
  flow.sectors += (at + bytes + kSector - 1) / kSector - at / kSector;
  count_up(write ? region->writes : region->reads, offset, bytes);
}

}  // namespace cuda_emulator
