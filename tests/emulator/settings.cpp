#include "settings.h"

namespace cuda_emulator {
namespace {

uint64_t random_state = 0;

}  // namespace

std::string where(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

Settings& settings() {
  static Settings instance;
  return instance;
}

void restart_schedule() { random_state = settings().seed; }

// splitmix64; the high half of the product is fair enough for the counts there are.
uint64_t random_below(uint64_t count) {
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(z) * count) >> 64);
}

std::string schedule_text() {
  const Settings& s = settings();
  const char* name = s.order == Order::forward   ? "forward"
                     : s.order == Order::reverse ? "reverse"
                                                 : "random";
  std::string words = std::string("(") + name + " schedule";
  if (s.order == Order::random) words += ", seed " + std::to_string(s.seed);
  return words + ", resident blocks " + std::to_string(s.resident_blocks) + ")";
}

}  // namespace cuda_emulator
