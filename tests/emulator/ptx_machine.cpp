#include "ptx_machine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "atomics.h"
#include "clusters.h"
#include "ptx_program.h"
#include "scheduler.h"
#include "trap.h"

namespace cuda_emulator::ptx {

struct Frame;
struct Instruction;
using Run = void (*)(Frame&, const Instruction&);

constexpr int32_t kNone = std::numeric_limits<int32_t>::min();

struct Instruction {
  Run run = nullptr;
  int32_t guard = kNone;
  bool guard_is_not = false;
  Space space = Space::generic;
  uint8_t bytes = 0;  // of an element
  uint8_t count = 1;  // elements of a vector
  bool is_signed = false;
  // Registers from 0 on, constants below: ~index.
  int32_t o[10] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};
  uint64_t offset = 0;  // of memory; where a branch goes; a selector
  MemoryOrder order = MemoryOrder::relaxed;
  Scope scope = Scope::device;
  const Code* callee = nullptr;
  const char* what = nullptr;
  mutable uint64_t runs = 0;
};

// As std::source_location keeps them.
struct Place {
  const char* file;
  const char* function;
  unsigned line;
  unsigned column;
};

struct Code {
  std::unique_ptr<Function> function;
  std::vector<Instruction> instructions;
  std::vector<Place> places;
  std::vector<uint64_t> constants;
  uint32_t own_words = 0;  // of parameters and local memory, behind the registers
  mutable std::deque<SharedKey> keys;
  bool decoded = false;
};

struct Frame {
  uint64_t* r;
  const uint64_t* constants;
  const Code* code;
  size_t at;  // the next instruction
  Thread* thread;
  Block* block;
  unsigned char* shared;
};

namespace {

std::map<std::string, Code>& codes() {
  static std::map<std::string, Code> instance;
  return instance;
}
std::deque<std::string>& texts() {
  static std::deque<std::string> instance;
  return instance;
}

Site site_of(const Frame& f, const Instruction& i) {
  static_assert(sizeof(Site) == sizeof(const Place*) && std::is_trivially_copyable_v<Site>);
  return std::bit_cast<Site>(
      &f.code->places[static_cast<size_t>(&i - f.code->instructions.data())]);
}

[[noreturn]] void fail(const Frame& f, const Instruction& i, const std::string& what) {
  const InRuntime in_runtime;
  f.block->fail(*f.thread, "PTX: " + what, site_of(f, i));
}

uint64_t raw(const Frame& f, int32_t i) { return i >= 0 ? f.r[i] : f.constants[~i]; }

template <class T>
T get(const Frame& f, int32_t i) {
  const uint64_t bits = raw(f, i);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}
template <class T>
void set(Frame& f, int32_t i, T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  if (i >= 0) f.r[i] = bits;  // else it is "_"
}

// ---- types

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

float widen(Half a) { return __half2float(std::bit_cast<__half>(a)); }
float widen(Bfloat a) { return std::bit_cast<float>(uint32_t{a.bits} << 16); }
template <class T>
T widen(T a) {
  return a;
}
void narrow(float a, Half& to) { to = std::bit_cast<Half>(__float2half_rn(a)); }
void narrow(float a, Bfloat& to) { to = std::bit_cast<Bfloat>(__float2bfloat16_rn(a)); }

template <class T>
struct As {};

// Calls f(As<T>{}) with the host's type; false where the type has none.
template <class F>
bool with_integer(Type type, F&& f) {
  switch (type) {
    case Type::u8:
    case Type::b8:
      return f(As<uint8_t>{}), true;
    case Type::u16:
    case Type::b16:
      return f(As<uint16_t>{}), true;
    case Type::u32:
    case Type::b32:
      return f(As<uint32_t>{}), true;
    case Type::u64:
    case Type::b64:
      return f(As<uint64_t>{}), true;
    case Type::s8:
      return f(As<int8_t>{}), true;
    case Type::s16:
      return f(As<int16_t>{}), true;
    case Type::s32:
      return f(As<int32_t>{}), true;
    case Type::s64:
      return f(As<int64_t>{}), true;
    default:
      return false;
  }
}
template <class F>
bool with_float(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(As<float>{}), true;
    case Type::f64:
      return f(As<double>{}), true;
    case Type::f16:
      return f(As<Half>{}), true;
    case Type::bf16:
      return f(As<Bfloat>{}), true;
    default:
      return false;
  }
}
template <class F>
bool with_type(Type type, F&& f) {
  return with_integer(type, f) || with_float(type, f);
}

// ---- arithmetic

template <class T, class Operation>
void unary(Frame& f, const Instruction& i) {
  set(f, i.o[0], static_cast<T>(Operation{}(get<T>(f, i.o[1]))));
}
template <class T, class Operation>
void binary(Frame& f, const Instruction& i) {
  set(f, i.o[0], static_cast<T>(Operation{}(get<T>(f, i.o[1]), get<T>(f, i.o[2]))));
}
template <class T, class Operation>
void ternary(Frame& f, const Instruction& i) {
  set(f, i.o[0],
      static_cast<T>(Operation{}(get<T>(f, i.o[1]), get<T>(f, i.o[2]), get<T>(f, i.o[3]))));
}

// Integers wrap.
template <class T>
struct WrapOf {
  using type = T;
};
template <class T>
  requires std::is_integral_v<T>
struct WrapOf<T> {
  using type = std::conditional_t<(sizeof(T) < 4), uint32_t, std::make_unsigned_t<T>>;
};
template <class T>
typename WrapOf<T>::type wrap(T a) {
  return static_cast<typename WrapOf<T>::type>(a);
}

template <class Operation>
struct Wrapping {
  template <class T>
  auto operator()(T a, T b) const {
    return Operation{}(wrap(a), wrap(b));
  }
};
using Add = Wrapping<std::plus<>>;
using Sub = Wrapping<std::minus<>>;
using Mul = Wrapping<std::multiplies<>>;
struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(~T{0});
      if constexpr (std::is_signed_v<T>) {
        if (b == -1) return static_cast<T>(0 - wrap(a));
      }
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a == b) return std::signbit(a) ? a : b;
      return std::fmin(a, b);
    } else {
      return std::min(a, b);
    }
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a == b) return std::signbit(a) ? b : a;
      return std::fmax(a, b);
    } else {
      return std::max(a, b);
    }
  }
};
struct Negate {
  template <class T>
  auto operator()(T a) const {
    if constexpr (std::is_integral_v<T>) {
      return 0 - wrap(a);
    } else {
      return -a;
    }
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>) {
      return std::fabs(a);
    } else {
      return static_cast<T>(a < 0 ? 0 - wrap(a) : wrap(a));
    }
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct FmaDown {
  float operator()(float a, float b, float c) const {
    const volatile float x = a, y = b, z = c;
    std::fesetround(FE_DOWNWARD);
    const volatile float sum = std::fma(x, y, z);
    std::fesetround(FE_TONEAREST);
    return sum;
  }
};
struct MulAdd {
  template <class T>
  auto operator()(T a, T b, T c) const {
    return wrap(a) * wrap(b) + wrap(c);
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Copysign {  // of the first
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
float flushed(float a) {
  return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : a;
}
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct ReciprocalFlushing {
  float operator()(float a) const { return flushed(1 / flushed(a)); }
  double operator()(double a) const {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / a) & 0xffffffff00000000u);
  }
};
struct ReciprocalRoot {
  float operator()(float a) const { return static_cast<float>(1 / std::sqrt(double{a})); }
};
struct Exp2 {
  float operator()(float a) const { return static_cast<float>(std::exp2(double{a})); }
};
struct Exp2Flushing {
  float operator()(float a) const { return flushed(Exp2{}(flushed(a))); }
};
struct Log2 {
  float operator()(float a) const { return static_cast<float>(std::log2(double{a})); }
};

// T of `a` and `b` half as wide.
template <class T, class Wide>
void multiply_wide(Frame& f, const Instruction& i) {
  set(f, i.o[0],
      static_cast<Wide>(static_cast<Wide>(get<T>(f, i.o[1])) *
                        static_cast<Wide>(get<T>(f, i.o[2]))));
}
template <class T, class Wide>
void multiply_wide_add(Frame& f, const Instruction& i) {
  using W = std::make_unsigned_t<Wide>;
  set(f, i.o[0],
      static_cast<W>(static_cast<W>(static_cast<Wide>(get<T>(f, i.o[1])) *
                                    static_cast<Wide>(get<T>(f, i.o[2]))) +
                     get<W>(f, i.o[3])));
}

template <class T>
void shift_left(Frame& f, const Instruction& i) {
  const auto by = get<uint32_t>(f, i.o[2]);
  set(f, i.o[0], by >= 8 * sizeof(T) ? T{0} : static_cast<T>(wrap(get<T>(f, i.o[1])) << by));
}
template <class T>
void shift_right(Frame& f, const Instruction& i) {
  const uint32_t by = std::min<uint32_t>(get<uint32_t>(f, i.o[2]), 8 * sizeof(T));
  const auto a = get<T>(f, i.o[1]);
  if (by == 8 * sizeof(T)) {
    set(f, i.o[0], static_cast<T>(a < 0 ? -1 : 0));
  } else {
    set(f, i.o[0], static_cast<T>(a >> by));
  }
}

void extract_bits(Frame& f, const Instruction& i) {
  const auto a = get<uint32_t>(f, i.o[1]);
  const uint32_t from = get<uint32_t>(f, i.o[2]) & 255, length = get<uint32_t>(f, i.o[3]) & 255;
  const uint32_t shifted = from >= 32 ? 0 : a >> from;
  set(f, i.o[0], length >= 32 ? shifted : shifted & ((uint32_t{1} << length) - 1));
}

void insert_bits(Frame& f, const Instruction& i) {
  const auto from = get<uint32_t>(f, i.o[1]), into = get<uint32_t>(f, i.o[2]);
  const uint32_t at = get<uint32_t>(f, i.o[3]) & 255, length = get<uint32_t>(f, i.o[4]) & 255;
  const uint32_t all = length >= 32 ? ~uint32_t{0} : (uint32_t{1} << length) - 1;
  const uint32_t mask = at >= 32 ? 0 : all << at;
  set(f, i.o[0], (into & ~mask) | (at >= 32 ? 0 : from << at & mask));
}

void permute_bytes(Frame& f, const Instruction& i) {
  const uint64_t both = get<uint32_t>(f, i.o[1]) | uint64_t{get<uint32_t>(f, i.o[2])} << 32;
  const auto selector = get<uint32_t>(f, i.o[3]);
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t by = selector >> (4 * k) & 15;
    auto byte = static_cast<uint8_t>(both >> (8 * (by & 7)));
    if (by & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t{byte} << (8 * k);
  }
  set(f, i.o[0], result);
}

void population(Frame& f, const Instruction& i) {
  set(f, i.o[0], static_cast<uint32_t>(std::popcount(raw(f, i.o[1]))));
}
template <class T>
void leading_zeros(Frame& f, const Instruction& i) {
  set(f, i.o[0], static_cast<uint32_t>(std::countl_zero(get<T>(f, i.o[1]))));
}
template <class T>
void reverse_bits(Frame& f, const Instruction& i) {
  auto a = get<T>(f, i.o[1]);
  T b = 0;
  for (size_t k = 0; k < 8 * sizeof(T); ++k, a >>= 1) b = static_cast<T>(b << 1 | (a & 1));
  set(f, i.o[0], b);
}

// ---- predicates

enum class Compare { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

template <class T, Compare kCompare>
bool compare(T a, T b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  switch (kCompare) {
    case Compare::eq:
      return !unordered && a == b;
    case Compare::ne:
      return !unordered && a != b;
    case Compare::lt:
      return a < b;
    case Compare::le:
      return a <= b;
    case Compare::gt:
      return a > b;
    case Compare::ge:
      return a >= b;
    case Compare::equ:
      return unordered || a == b;
    case Compare::neu:
      return unordered || a != b;
    case Compare::ltu:
      return unordered || a < b;
    case Compare::leu:
      return unordered || a <= b;
    case Compare::gtu:
      return unordered || a > b;
    case Compare::geu:
      return unordered || a >= b;
    case Compare::num:
      return !unordered;
    case Compare::nan:
      return unordered;
  }
}
template <class T, Compare kCompare>
void set_predicate(Frame& f, const Instruction& i) {
  using Number = decltype(widen(T{}));
  const bool result = compare<Number, kCompare>(widen(get<T>(f, i.o[1])), widen(get<T>(f, i.o[2])));
  set(f, i.o[0], static_cast<uint8_t>(result));
}

template <class T>
Run comparison(const std::string& name) {
  static const std::map<std::string, Run> kRuns = {
      {"eq", &set_predicate<T, Compare::eq>},   {"ne", &set_predicate<T, Compare::ne>},
      {"lt", &set_predicate<T, Compare::lt>},   {"le", &set_predicate<T, Compare::le>},
      {"gt", &set_predicate<T, Compare::gt>},   {"ge", &set_predicate<T, Compare::ge>},
      {"equ", &set_predicate<T, Compare::equ>}, {"neu", &set_predicate<T, Compare::neu>},
      {"ltu", &set_predicate<T, Compare::ltu>}, {"leu", &set_predicate<T, Compare::leu>},
      {"gtu", &set_predicate<T, Compare::gtu>}, {"geu", &set_predicate<T, Compare::geu>},
      {"num", &set_predicate<T, Compare::num>}, {"nan", &set_predicate<T, Compare::nan>},
      {"lo", &set_predicate<T, Compare::lt>},   {"ls", &set_predicate<T, Compare::le>},
      {"hi", &set_predicate<T, Compare::gt>},   {"hs", &set_predicate<T, Compare::ge>},
  };
  const auto found = kRuns.find(name);
  return found == kRuns.end() ? nullptr : found->second;
}

void select(Frame& f, const Instruction& i) {
  set(f, i.o[0], raw(f, (raw(f, i.o[3]) & 1) != 0 ? i.o[1] : i.o[2]));
}

struct PredicateNot {
  uint8_t operator()(uint8_t a) const { return a ^ 1; }
};

// ---- conversions

enum class Round { nearest, zero, down, up, saturate };

template <class T>
T rounded(T a, Round round) {
  switch (round) {
    case Round::zero:
      return std::trunc(a);
    case Round::down:
      return std::floor(a);
    case Round::up:
      return std::ceil(a);
    default:
      return std::nearbyint(a);
  }
}

template <class To, class From, Round kRound, bool kInteger>
void convert(Frame& f, const Instruction& i) {
  const auto a = widen(get<From>(f, i.o[1]));
  using A = std::remove_const_t<decltype(a)>;
  if constexpr (std::is_integral_v<To> && std::is_floating_point_v<A>) {
    // Saturates; NaN is 0.
    const A r = rounded(a, kRound);
    constexpr auto kLeast = static_cast<A>(std::numeric_limits<To>::min());
    To result;
    if (std::isnan(r)) {
      result = 0;
    } else if (r < kLeast) {
      result = std::numeric_limits<To>::min();
    } else if (r >= std::ldexp(static_cast<A>(1), std::numeric_limits<To>::digits)) {
      result = std::numeric_limits<To>::max();
    } else {
      result = static_cast<To>(r);
    }
    set(f, i.o[0], result);
  } else if constexpr (std::is_same_v<To, Half> || std::is_same_v<To, Bfloat>) {
    To result;
    narrow(static_cast<float>(a), result);
    set(f, i.o[0], result);
  } else if constexpr (std::is_floating_point_v<To> && std::is_floating_point_v<A>) {
    auto result = static_cast<To>(kInteger ? rounded(a, kRound) : a);
    if (kRound == Round::saturate) {
      result = result > 0 ? std::min(result, To{1}) : To{0};
    }
    set(f, i.o[0], result);
  } else {
    // A register may be wider than what is converted to.
    if constexpr (std::is_signed_v<To> && std::is_integral_v<To>) {
      set(f, i.o[0], static_cast<int64_t>(static_cast<To>(a)));
    } else {
      set(f, i.o[0], static_cast<To>(a));
    }
  }
}

template <class T>
void convert_pair(Frame& f, const Instruction& i) {
  T high, low;
  narrow(get<float>(f, i.o[1]), high);
  narrow(get<float>(f, i.o[2]), low);
  set(f, i.o[0], uint32_t{low.bits} | uint32_t{high.bits} << 16);
}

// ---- moves

template <class T>
void move(Frame& f, const Instruction& i) {
  set(f, i.o[0], get<T>(f, i.o[1]));
}
// {a, b, …} = c and c = {a, b, …}, `bytes` each.
void take_apart(Frame& f, const Instruction& i) {
  const uint64_t all = raw(f, i.o[0]);
  for (unsigned k = 0; k < i.count; ++k) {
    const uint64_t part = all >> (8 * i.bytes * k);
    set(f, i.o[1 + k], i.bytes == 8 ? part : part & ((uint64_t{1} << (8 * i.bytes)) - 1));
  }
}
void put_together(Frame& f, const Instruction& i) {
  uint64_t all = 0;
  for (unsigned k = 0; k < i.count; ++k) {
    const uint64_t part = raw(f, i.o[1 + k]) & ((uint64_t{1} << (8 * i.bytes)) - 1);
    all |= part << (8 * i.bytes * k);
  }
  set(f, i.o[0], all);
}

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctarank,
  cluster_nctarank,
  clusterid_x,
  nclusterid_x,
  unknown,
};
Special special_of(const std::string& name) {
  static const std::map<std::string, Special> kNames = {
      {"tid.x", Special::tid_x},
      {"tid.y", Special::tid_y},
      {"tid.z", Special::tid_z},
      {"ntid.x", Special::ntid_x},
      {"ntid.y", Special::ntid_y},
      {"ntid.z", Special::ntid_z},
      {"ctaid.x", Special::ctaid_x},
      {"ctaid.y", Special::ctaid_y},
      {"ctaid.z", Special::ctaid_z},
      {"nctaid.x", Special::nctaid_x},
      {"nctaid.y", Special::nctaid_y},
      {"nctaid.z", Special::nctaid_z},
      {"laneid", Special::laneid},
      {"warpid", Special::warpid},
      {"cluster_ctarank", Special::cluster_ctarank},
      {"cluster_nctarank", Special::cluster_nctarank},
      {"clusterid.x", Special::clusterid_x},
      {"nclusterid.x", Special::nclusterid_x},
  };
  const auto found = kNames.find(name);
  return found == kNames.end() ? Special::unknown : found->second;
}
uint32_t value_of(const Frame& f, Special special) {
  switch (special) {
    case Special::tid_x:
      return threadIdx.x;
    case Special::tid_y:
      return threadIdx.y;
    case Special::tid_z:
      return threadIdx.z;
    case Special::ntid_x:
      return blockDim.x;
    case Special::ntid_y:
      return blockDim.y;
    case Special::ntid_z:
      return blockDim.z;
    case Special::ctaid_x:
      return blockIdx.x;
    case Special::ctaid_y:
      return blockIdx.y;
    case Special::ctaid_z:
      return blockIdx.z;
    case Special::nctaid_x:
      return gridDim.x;
    case Special::nctaid_y:
      return gridDim.y;
    case Special::nctaid_z:
      return gridDim.z;
    case Special::laneid:
      return f.thread->lane();
    case Special::warpid:
      return f.thread->linear / 32;
    case Special::cluster_ctarank:
      return __clusterRelativeBlockRank();
    case Special::cluster_nctarank:
      return __clusterSizeInBlocks();
    case Special::clusterid_x:
      return __clusterIdx().x;
    case Special::nclusterid_x:
      return __clusterGridDimInClusters().x;
    case Special::unknown:
      break;
  }
  return 0;
}
void move_special(Frame& f, const Instruction& i) {
  set(f, i.o[0], value_of(f, static_cast<Special>(i.offset)));
}

// ---- memory

constexpr uint64_t kPolicyFirst = 0x1f1f, kPolicyNormal = 0x2f2f;

void make_policy(Frame& f, const Instruction& i) { set(f, i.o[0], i.offset); }
void check_policy(const Frame& f, const Instruction& i, int32_t policy) {
  if (policy == kNone) return;
  const uint64_t bits = raw(f, policy);
  if (bits != kPolicyFirst && bits != kPolicyNormal) fail(f, i, "not a cache policy");
}

unsigned char* in_shared(const Frame& f, const Instruction& i, uint64_t address, uint64_t bytes) {
  const auto place = static_cast<uint32_t>(address);
  if (place + bytes > SharedMemory::kCapacity) fail(f, i, "an address beyond shared memory");
  return f.shared + place;
}

unsigned char* place_of(const Frame& f, const Instruction& i, uint64_t bytes) {
  const uint64_t address = (i.o[0] == kNone ? 0 : raw(f, i.o[0])) + i.offset;
  if (address % bytes != 0) {
    fail(f, i,
         "an access of " + std::to_string(bytes) + " bytes that is not on a boundary of as many");
  }
  if (i.space == Space::shared) return in_shared(f, i, address, bytes);
  auto* place = reinterpret_cast<unsigned char*>(address);
  if (i.space == Space::global && f.block->shared().holds(place)) {
    fail(f, i, "an address of shared memory, taken for a global one");
  }
  return place;
}

void tell(const void* data, size_t bytes, bool writes, const Instruction& i) {
  const InRuntime in_runtime;
  observer()->accessed(data, bytes, writes, &i);
}

void load_plain(Frame& f, const Instruction& i) {
  const unsigned bytes = i.bytes * i.count;
  const unsigned char* from = place_of(f, i, bytes);
  if (observer() != nullptr) tell(from, bytes, false, i);
  for (unsigned k = 0; k < i.count; ++k) {
    uint64_t bits = 0;
    std::memcpy(&bits, from + k * i.bytes, i.bytes);
    if (i.is_signed && i.bytes < 8 && (bits >> (8 * i.bytes - 1) & 1) != 0) {
      bits |= ~uint64_t{0} << (8 * i.bytes);
    }
    set(f, i.o[1 + k], bits);
  }
}
void store_plain(Frame& f, const Instruction& i) {
  const unsigned bytes = i.bytes * i.count;
  unsigned char* to = place_of(f, i, bytes);
  check_policy(f, i, i.o[9]);
  if (observer() != nullptr) tell(to, bytes, true, i);
  for (unsigned k = 0; k < i.count; ++k) {
    const uint64_t bits = raw(f, i.o[1 + k]);
    std::memcpy(to + k * i.bytes, &bits, i.bytes);
  }
}

template <class T>
void load_ordered(Frame& f, const Instruction& i) {
  set(f, i.o[1],
      load(reinterpret_cast<T*>(place_of(f, i, sizeof(T))), i.order, i.scope, site_of(f, i)));
}
template <class T>
void store_ordered(Frame& f, const Instruction& i) {
  store(reinterpret_cast<T*>(place_of(f, i, sizeof(T))), get<T>(f, i.o[1]), i.order, i.scope,
        site_of(f, i));
}
// o[1] = *o[0], which becomes Operation(it, o[2])
template <class T, class Operation>
void update_ordered(Frame& f, const Instruction& i) {
  const T value = get<T>(f, i.o[2]);
  const T before = update(
      reinterpret_cast<T*>(place_of(f, i, sizeof(T))),
      [value](T was) { return static_cast<T>(Operation{}(was, value)); }, i.order, i.scope,
      site_of(f, i));
  if (i.o[1] != kNone) set(f, i.o[1], before);
}
struct Exchange {
  template <class T>
  T operator()(T, T b) const {
    return b;
  }
};
template <class T>
void swap_ordered(Frame& f, const Instruction& i) {
  const T before = compare_swap(reinterpret_cast<T*>(place_of(f, i, sizeof(T))), get<T>(f, i.o[2]),
                                get<T>(f, i.o[3]), i.order, i.scope, site_of(f, i));
  if (i.o[1] != kNone) set(f, i.o[1], before);
}

void copy_async(Frame& f, const Instruction& i) {
  const uint64_t size = i.bytes;
  const uint64_t from = raw(f, i.o[1]) + raw(f, i.o[4]);
  check_policy(f, i, i.o[9]);
  const uint64_t bytes =
      i.o[2] == kNone ? size : std::min<uint64_t>(get<uint32_t>(f, i.o[2]), size);
  async_copy(in_shared(f, i, raw(f, i.o[0]) + raw(f, i.o[3]), size),
             reinterpret_cast<const void*>(from), bytes, size - bytes, site_of(f, i));
}
void commit_copies(Frame&, const Instruction&) { async_commit(); }
void wait_for_copies(Frame& f, const Instruction& i) {
  async_wait_prior(raw(f, i.o[0]), site_of(f, i));
}

void shared_to_generic(Frame& f, const Instruction& i) {
  set(f, i.o[0], reinterpret_cast<uint64_t>(f.shared + static_cast<uint32_t>(raw(f, i.o[1]))));
}
void generic_to_shared(Frame& f, const Instruction& i) {
  set(f, i.o[0], raw(f, i.o[1]) - reinterpret_cast<uint64_t>(f.shared));
}
void map_address(Frame& f, const Instruction& i) {
  const auto* address = reinterpret_cast<const void*>(raw(f, i.o[1]));
  set(f, i.o[0],
      reinterpret_cast<uint64_t>(map_shared(address, get<uint32_t>(f, i.o[2]), site_of(f, i))));
}

// ---- control

void branch(Frame& f, const Instruction& i) { f.at = i.offset; }
void leave(Frame& f, const Instruction&) { f.at = f.code->instructions.size() - 1; }
void nothing(Frame&, const Instruction&) {}
void unknown(Frame& f, const Instruction& i) {
  fail(f, i, std::string("an instruction that is unknown here: ") + i.what);
}
void call(Frame& f, const Instruction& i);
void decode(Code& code);

// ---- what threads do together

template <bool kAligned>
void wait_at_barrier(Frame& f, const Instruction& i) {
  wait_for_barrier(get<uint32_t>(f, i.o[0]), i.o[1] == kNone ? 0 : get<uint32_t>(f, i.o[1]),
                   kAligned, false, site_of(f, i));
}
void come_to_barrier(Frame& f, const Instruction& i) {
  arrive_at_barrier(get<uint32_t>(f, i.o[0]), get<uint32_t>(f, i.o[1]), site_of(f, i));
}
template <class Operation>
void reduce_at_barrier(Frame& f, const Instruction& i) {
  const bool vote = (raw(f, i.o[2]) & 1) != 0;
  const unsigned votes = wait_for_barrier(get<uint32_t>(f, i.o[1]), 0, true,
                                          Operation::kInverse ? !vote : vote, site_of(f, i));
  set(f, i.o[0], Operation::result(votes));
}
struct VoteAnd {
  static constexpr bool kInverse = true;
  static uint8_t result(unsigned votes) { return votes == 0; }
};
struct VoteOr {
  static constexpr bool kInverse = false;
  static uint8_t result(unsigned votes) { return votes != 0; }
};
struct VoteCount {
  static constexpr bool kInverse = false;
  static uint32_t result(unsigned votes) { return votes; }
};

void sync_warp(Frame& f, const Instruction& i) {
  wait_for_warp(Collective::sync, get<uint32_t>(f, i.o[0]), 0, 0, site_of(f, i));
}
enum class Shuffle { idx, bfly, down, up };
// o: result, predicate, value, b, c, mask
template <Shuffle kShuffle>
void shuffle_warp(Frame& f, const Instruction& i) {
  const int lane = static_cast<int>(f.thread->lane());
  const auto b = static_cast<int>(get<uint32_t>(f, i.o[3]) & 31);
  const auto c = get<uint32_t>(f, i.o[4]);
  const auto clamp = static_cast<int>(c & 31), segment = static_cast<int>(c >> 8 & 31);
  const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
  int from = 0;
  bool valid = false;
  switch (kShuffle) {
    case Shuffle::idx:
      from = least | (b & ~segment);
      valid = from <= most;
      break;
    case Shuffle::bfly:
      from = lane ^ b;
      valid = from <= most;
      break;
    case Shuffle::down:
      from = lane + b;
      valid = from <= most;
      break;
    case Shuffle::up:
      from = lane - b;
      valid = from >= most;
      break;
  }
  const uint64_t got = wait_for_warp(Collective::shuffle, get<uint32_t>(f, i.o[5]),
                                     get<uint32_t>(f, i.o[2]), valid ? from : lane, site_of(f, i));
  set(f, i.o[0], static_cast<uint32_t>(got));
  if (i.o[1] != kNone) set(f, i.o[1], static_cast<uint8_t>(valid));
}
enum class Vote { ballot, any, all };
template <Vote kVote>
void vote_warp(Frame& f, const Instruction& i) {
  const auto mask = get<uint32_t>(f, i.o[2]);
  const auto votes = static_cast<uint32_t>(
      wait_for_warp(Collective::ballot, mask, raw(f, i.o[1]) & 1, 0, site_of(f, i)));
  if (kVote == Vote::ballot) {
    set(f, i.o[0], votes);
  } else {
    set(f, i.o[0], static_cast<uint8_t>(kVote == Vote::any ? votes != 0 : votes == mask));
  }
}
void reduce_warp(Frame& f, const Instruction& i) {
  set(f, i.o[0],
      static_cast<uint32_t>(wait_for_warp(static_cast<Collective>(i.offset),
                                          get<uint32_t>(f, i.o[2]), get<uint32_t>(f, i.o[1]), 0,
                                          site_of(f, i))));
}
template <bool kRelaxed>
void come_to_cluster(Frame& f, const Instruction& i) {
  cluster_arrive(kRelaxed, site_of(f, i));
}
void wait_for_cluster(Frame& f, const Instruction& i) { cluster_wait(site_of(f, i)); }
void sleep(Frame& f, const Instruction& i) { give_way(site_of(f, i)); }
void order_memory(Frame& f, const Instruction& i) { fence(i.scope, site_of(f, i)); }

// ---- from statements to instructions

class Decoder {
 public:
  explicit Decoder(Code& code) : code_(code), f_(*code.function) {}

  void run() {
    for (Variable& v : f_.variables) {
      if (v.space != Space::param && v.space != Space::local) continue;
      code_.own_words += (v.bytes + 7) / 8;
    }
    for (const Statement& s : f_.body) {
      Instruction i;
      i.guard = s.guard < 0 ? kNone : s.guard;
      i.guard_is_not = s.guard_is_not;
      s_ = &s;
      decode(s, i);
      if (i.run == nullptr) {
        texts().push_back(s.name());
        i.what = texts().back().c_str();
        i.run = &unknown;
      }
      code_.instructions.push_back(i);
      code_.places.push_back({f_.file.c_str(), f_.name.c_str(), s.line, 0});
    }
    Instruction end;
    end.run = &nothing;
    code_.instructions.push_back(end);
    code_.places.push_back({f_.file.c_str(), f_.name.c_str(), f_.line, 0});
  }

 private:
  int32_t constant(uint64_t bits) {
    const auto found = std::find(code_.constants.begin(), code_.constants.end(), bits);
    const auto index = static_cast<int32_t>(found - code_.constants.begin());
    if (found == code_.constants.end()) code_.constants.push_back(bits);
    return ~index;
  }
  int32_t index_of(const Operand& o) {
    switch (o.kind) {
      case Operand::Kind::reg:
        return o.reg;
      case Operand::Kind::immediate:
        return constant(o.bits);
      default:
        return kNone;
    }
  }
  uint64_t target(const std::string& label) const {
    const auto found = f_.labels.find(label);
    if (found == f_.labels.end()) {
      throw Syntax(f_.file + ":" + std::to_string(s_->line) + ": no label " + label);
    }
    return found->second;
  }
  // Of [place], into o[0] and offset.
  void address(const Operand& place, Instruction& i) {
    i.o[0] = place.reg < 0 ? kNone : place.reg;
    i.offset = place.bits;
  }
  static Space space_of(const Statement& s) {
    for (const std::string& word : s.words) {
      if (word == "global") return Space::global;
      if (word.rfind("shared", 0) == 0) return Space::shared;
      if (word == "param") return Space::param;
      if (word == "local") return Space::local;
    }
    return Space::generic;
  }
  static void order_of_words(const Statement& s, Instruction& i) {
    for (const std::string& word : s.words) {
      if (word == "acquire") i.order = MemoryOrder::acquire;
      if (word == "release") i.order = MemoryOrder::release;
      if (word == "acq_rel") i.order = MemoryOrder::acq_rel;
      if (word == "sc") i.order = MemoryOrder::seq_cst;
      if (word == "cta") i.scope = Scope::block;
      if (word == "cluster") i.scope = Scope::cluster;
      if (word == "gpu" || word == "gl") i.scope = Scope::device;
      if (word == "sys") i.scope = Scope::system;
    }
  }

  template <class Operation>
  void number(Type type, Instruction& i) {  // any
    with_type(type, [&]<class T>(As<T>) {
      if constexpr (std::is_arithmetic_v<T>) i.run = &binary<T, Operation>;
    });
  }
  template <class Operation>
  void whole(Type type, Instruction& i) {
    with_integer(type, [&]<class T>(As<T>) { i.run = &binary<T, Operation>; });
  }
  template <class Operation>
  void bits(Type type, Instruction& i) {
    if (type == Type::pred) {
      i.run = &binary<uint8_t, Operation>;
    } else {
      whole<Operation>(type, i);
    }
  }
  template <class Operation>
  void real(Type type, Instruction& i) {
    if (type == Type::f32) i.run = &unary<float, Operation>;
    if (type == Type::f64) i.run = &unary<double, Operation>;
  }
  template <class Operation>
  void unary_number(Type type, Instruction& i) {
    with_type(type, [&]<class T>(As<T>) {
      if constexpr (std::is_arithmetic_v<T>) i.run = &unary<T, Operation>;
    });
  }

  template <class To, class From>
  static Run conversion(const Statement& s) {
    const bool integer = s.says("rni") || s.says("rzi") || s.says("rmi") || s.says("rpi");
    if (s.says("sat")) return &convert<To, From, Round::saturate, false>;
    if (s.says("rzi")) return &convert<To, From, Round::zero, true>;
    if (s.says("rmi")) return &convert<To, From, Round::down, true>;
    if (s.says("rpi")) return &convert<To, From, Round::up, true>;
    return integer ? &convert<To, From, Round::nearest, true>
                   : &convert<To, From, Round::nearest, false>;
  }

  void decode(const Statement& s, Instruction& i);
  void decode_convert(const Statement& s, Type to, Type from, Instruction& i) {
    if (from == Type::f32 && (to == Type::f16x2 || to == Type::bf16x2)) {
      i.run = to == Type::f16x2 ? &convert_pair<Half> : &convert_pair<Bfloat>;
      return;
    }
    with_type(to, [&]<class To>(As<To>) {
      with_type(from, [&]<class From>(As<From>) { i.run = conversion<To, From>(s); });
    });
  }
  void decode_move(const Statement& s, Type type, Instruction& i) {
    const Operand& to = s.operands[0];
    const Operand& from = s.operands[1];
    if (to.kind == Operand::Kind::list || from.kind == Operand::Kind::list) {
      const bool apart = to.kind == Operand::Kind::list;
      const std::vector<Operand>& parts = (apart ? to : from).items;
      i.count = static_cast<uint8_t>(parts.size());
      i.bytes = static_cast<uint8_t>(size_of(type) / parts.size());
      i.o[0] = index_of(apart ? from : to);
      for (size_t k = 0; k < parts.size(); ++k) i.o[1 + k] = index_of(parts[k]);
      i.run = apart ? &take_apart : &put_together;
    } else if (from.kind == Operand::Kind::special) {
      const Special special = special_of(from.name);
      if (special == Special::unknown) return;
      i.offset = static_cast<uint64_t>(special);
      i.run = &move_special;
    } else if (from.kind == Operand::Kind::label) {
      return;
    } else if (type == Type::pred) {
      i.run = &move<uint8_t>;
    } else {
      with_type(type, [&]<class T>(As<T>) { i.run = &move<T>; });
    }
  }
  void decode_memory(const Statement& s, Type type, Instruction& i) {
    const bool load = s.words[0] == "ld";
    const Operand& place = s.operands[load ? 1 : 0];
    const Operand& value = s.operands[load ? 0 : 1];
    i.space = space_of(s);
    i.bytes = static_cast<uint8_t>(size_of(type));
    i.is_signed = is_signed(type);
    order_of_words(s, i);
    std::fill(std::begin(i.o), std::end(i.o), kNone);
    address(place, i);
    if (value.kind == Operand::Kind::list) {
      i.count = static_cast<uint8_t>(value.items.size());
      for (size_t k = 0; k < value.items.size(); ++k) i.o[1 + k] = index_of(value.items[k]);
    } else {
      i.o[1] = index_of(value);
    }
    if (s.operands.size() > 2) i.o[9] = index_of(s.operands[2]);
    if (s.says("acquire") || s.says("relaxed") || s.says("release") || s.says("volatile")) {
      with_type(type, [&]<class T>(As<T>) { i.run = load ? &load_ordered<T> : &store_ordered<T>; });
    } else {
      i.run = load ? &load_plain : &store_plain;
    }
  }
  void decode_atomic(const Statement& s, Type type, Instruction& i) {
    const bool result = s.words[0] == "atom";
    i.space = space_of(s);
    order_of_words(s, i);
    std::fill(std::begin(i.o), std::end(i.o), kNone);
    address(s.operands[result ? 1 : 0], i);
    if (result) i.o[1] = index_of(s.operands[0]);
    for (size_t k = result ? 2 : 1, to = 2; k < s.operands.size(); ++k, ++to) {
      i.o[to] = index_of(s.operands[k]);
    }
    with_type(type, [&]<class T>(As<T>) {
      if constexpr (std::is_arithmetic_v<T>) {
        if (s.says("add")) i.run = &update_ordered<T, Add>;
        if (s.says("exch")) i.run = &update_ordered<T, Exchange>;
        if (s.says("cas")) i.run = &swap_ordered<T>;
        if (s.says("min")) i.run = &update_ordered<T, Min>;
        if (s.says("max")) i.run = &update_ordered<T, Max>;
        if constexpr (std::is_integral_v<T>) {
          if (s.says("and")) i.run = &update_ordered<T, std::bit_and<>>;
          if (s.says("or")) i.run = &update_ordered<T, std::bit_or<>>;
          if (s.says("xor")) i.run = &update_ordered<T, std::bit_xor<>>;
        }
      }
    });
  }
  void decode_copy(const Statement& s, Instruction& i) {
    std::fill(std::begin(i.o), std::end(i.o), kNone);
    if (s.says("commit_group")) {
      i.run = &commit_copies;
    } else if (s.says("wait_group")) {
      i.o[0] = index_of(s.operands[0]);
      i.run = &wait_for_copies;
    } else if (s.says("wait_all")) {
      i.o[0] = constant(0);
      i.run = &wait_for_copies;
    } else if (s.operands.size() >= 3 && s.says("async")) {
      i.o[0] = s.operands[0].reg;
      i.o[3] = constant(s.operands[0].bits);
      i.o[1] = s.operands[1].reg;
      i.o[4] = constant(s.operands[1].bits);
      i.bytes = static_cast<uint8_t>(s.operands[2].bits);
      const bool policy = s.says("L2::cache_hint");
      if (policy) i.o[9] = index_of(s.operands.back());
      if (s.operands.size() > (policy ? 4 : 3)) i.o[2] = index_of(s.operands[3]);
      // Past the L1 cache only as whole lines of 16 bytes.
      if (i.bytes != 16 && s.says("cg")) return;
      i.run = &copy_async;
    }
  }
  void decode_call(const Statement& s, Instruction& i);

  Code& code_;
  Function& f_;
  const Statement* s_ = nullptr;
};

void Decoder::decode(const Statement& s, Instruction& i) {
  const std::string& word = s.words[0];
  const Type type = type_of(s.words.back());
  const Type before = s.words.size() > 1 ? type_of(s.words[s.words.size() - 2]) : Type::none;
  for (size_t k = 0; k < s.operands.size() && k < std::size(i.o); ++k) {
    i.o[k] = index_of(s.operands[k]);
  }
  const auto is = [&](const char* name) { return word == name; };
  if (is("add")) number<Add>(type, i);
  if (is("sub")) number<Sub>(type, i);
  if (is("div")) number<Div>(type, i);
  if (is("rem")) {
    with_integer(type, [&]<class T>(As<T>) { i.run = &binary<T, Rem>; });
  }
  if (is("min") && !s.says("NaN")) number<Min>(type, i);
  if (is("max") && !s.says("NaN")) number<Max>(type, i);
  if (is("and")) bits<std::bit_and<>>(type, i);
  if (is("or")) bits<std::bit_or<>>(type, i);
  if (is("xor")) bits<std::bit_xor<>>(type, i);
  if (is("not")) {
    if (type == Type::pred) {
      i.run = &unary<uint8_t, PredicateNot>;
    } else {
      with_integer(type, [&]<class T>(As<T>) { i.run = &unary<T, std::bit_not<>>; });
    }
  }
  if (is("neg")) unary_number<Negate>(type, i);
  if (is("abs")) unary_number<Abs>(type, i);
  if (is("mul")) {
    if (s.says("hi")) {
      whole<MulHigh>(type, i);
    } else if (s.says("wide")) {
      if (type == Type::u16) i.run = &multiply_wide<uint16_t, uint32_t>;
      if (type == Type::s16) i.run = &multiply_wide<int16_t, int32_t>;
      if (type == Type::u32) i.run = &multiply_wide<uint32_t, uint64_t>;
      if (type == Type::s32) i.run = &multiply_wide<int32_t, int64_t>;
    } else {
      number<Mul>(type, i);
    }
  }
  if (is("mad")) {
    if (s.says("wide")) {
      if (type == Type::u32) i.run = &multiply_wide_add<uint32_t, uint64_t>;
      if (type == Type::s32) i.run = &multiply_wide_add<int32_t, int64_t>;
    } else if (s.says("lo")) {
      with_integer(type, [&]<class T>(As<T>) { i.run = &ternary<T, MulAdd>; });
    }
  }
  if (is("fma")) {
    if (type == Type::f32) {
      if (s.says("rn")) i.run = &ternary<float, Fma>;
      if (s.says("rm")) i.run = &ternary<float, FmaDown>;
    }
    if (type == Type::f64 && s.says("rn")) i.run = &ternary<double, Fma>;
  }
  if (is("sqrt")) real<Sqrt>(type, i);
  if (is("rcp")) {
    if (s.says("ftz")) {
      real<ReciprocalFlushing>(type, i);
    } else {
      real<Reciprocal>(type, i);
    }
  }
  if (is("rsqrt") && type == Type::f32) i.run = &unary<float, ReciprocalRoot>;
  if (is("ex2") && type == Type::f32) {
    i.run = s.says("ftz") ? &unary<float, Exp2Flushing> : &unary<float, Exp2>;
  }
  if (is("lg2") && type == Type::f32) i.run = &unary<float, Log2>;
  if (is("copysign")) {
    if (type == Type::f32) i.run = &binary<float, Copysign>;
    if (type == Type::f64) i.run = &binary<double, Copysign>;
  }
  if (is("shl")) {
    with_integer(type, [&]<class T>(As<T>) { i.run = &shift_left<T>; });
  }
  if (is("shr")) {
    with_integer(type, [&]<class T>(As<T>) { i.run = &shift_right<T>; });
  }
  if (is("bfe") && type == Type::u32) i.run = &extract_bits;
  if (is("bfi") && type == Type::b32) i.run = &insert_bits;
  if (is("prmt") && s.words.size() == 2) i.run = &permute_bytes;
  if (is("popc")) i.run = &population;
  if (is("clz")) i.run = type == Type::b64 ? &leading_zeros<uint64_t> : &leading_zeros<uint32_t>;
  if (is("brev")) i.run = type == Type::b64 ? &reverse_bits<uint64_t> : &reverse_bits<uint32_t>;
  if (is("setp") && s.words.size() == 3) {
    with_type(type, [&]<class T>(As<T>) { i.run = comparison<T>(s.words[1]); });
  }
  if (is("selp")) i.run = &select;
  if (is("cvt")) decode_convert(s, before, type, i);
  if (is("mov")) decode_move(s, type, i);
  if (is("ld") || is("st")) decode_memory(s, type, i);
  if (is("atom") || is("red")) decode_atomic(s, type, i);
  if (is("cp")) decode_copy(s, i);
  if (is("createpolicy") && s.says("fractional")) {
    i.offset = s.says("L2::evict_first") ? kPolicyFirst : kPolicyNormal;
    i.run = &make_policy;
  }
  if (is("cvta")) {
    const bool to = s.says("to");
    if (s.says("shared")) {
      i.run = to ? &generic_to_shared : &shared_to_generic;
    } else {
      i.run = &move<uint64_t>;
    }
  }
  if (is("mapa") && !s.says("shared::cluster")) i.run = &map_address;
  if (is("bra")) {
    i.offset = target(s.operands[0].name);
    i.run = &branch;
  }
  if (is("ret") || is("exit")) i.run = &leave;
  if (is("call")) decode_call(s, i);
  if (is("bar") || is("barrier")) {
    if (s.says("cluster")) {
      i.run = s.says("wait")      ? &wait_for_cluster
              : s.says("relaxed") ? &come_to_cluster<true>
                                  : &come_to_cluster<false>;
    } else if (s.says("warp")) {
      i.run = &sync_warp;
    } else if (s.says("red")) {
      if (s.says("and")) i.run = &reduce_at_barrier<VoteAnd>;
      if (s.says("or")) i.run = &reduce_at_barrier<VoteOr>;
      if (s.says("popc")) i.run = &reduce_at_barrier<VoteCount>;
    } else if (s.says("arrive")) {
      i.run = &come_to_barrier;
    } else if (s.says("sync")) {
      i.run = is("bar") || s.says("aligned") ? &wait_at_barrier<true> : &wait_at_barrier<false>;
    }
  }
  if (is("shfl") && s.says("sync")) {
    if (s.operands.size() == 5) {  // without a predicate
      for (size_t k = 5; k > 1; --k) i.o[k] = i.o[k - 1];
      i.o[1] = kNone;
    }
    if (s.says("idx")) i.run = &shuffle_warp<Shuffle::idx>;
    if (s.says("bfly")) i.run = &shuffle_warp<Shuffle::bfly>;
    if (s.says("down")) i.run = &shuffle_warp<Shuffle::down>;
    if (s.says("up")) i.run = &shuffle_warp<Shuffle::up>;
  }
  if (is("vote") && s.says("sync")) {
    if (s.says("ballot")) i.run = &vote_warp<Vote::ballot>;
    if (s.says("any")) i.run = &vote_warp<Vote::any>;
    if (s.says("all")) i.run = &vote_warp<Vote::all>;
  }
  if (is("redux") && s.says("sync")) {
    const bool sign = is_signed(type);
    i.offset = static_cast<uint64_t>(
        s.says("add")   ? Collective::add
        : s.says("min") ? (sign ? Collective::min_signed : Collective::min_unsigned)
        : s.says("max") ? (sign ? Collective::max_signed : Collective::max_unsigned)
        : s.says("and") ? Collective::bit_and
        : s.says("or")  ? Collective::bit_or
                        : Collective::bit_xor);
    i.run = &reduce_warp;
  }
  if (is("nanosleep")) i.run = &sleep;
  if (is("fence") || is("membar")) {
    order_of_words(s, i);
    i.run = &order_memory;
  }
}

// (results), name, (arguments): their addresses into o.
void Decoder::decode_call(const Statement& s, Instruction& i) {
  std::fill(std::begin(i.o), std::end(i.o), kNone);
  size_t to = 0;
  for (const Operand& o : s.operands) {
    if (o.kind == Operand::Kind::list) {
      for (const Operand& one : o.items) {
        if (to == std::size(i.o)) return;
        i.o[to++] = index_of(one);
      }
    } else if (const auto found = codes().find(o.name); found != codes().end()) {
      cuda_emulator::ptx::decode(found->second);
      i.callee = &found->second;
    }
  }
  if (i.callee != nullptr) i.run = &call;
}

void decode(Code& code) {
  if (code.decoded) return;
  code.decoded = true;
  Decoder(code).run();
}

// ---- running

void execute(Frame& f) {
  const Instruction* const code = f.code->instructions.data();
  const size_t end = f.code->instructions.size() - 1;
  while (f.at < end) {
    const Instruction& i = code[f.at++];
    ++i.runs;
    if (i.guard != kNone && ((f.r[i.guard] & 1) != 0) == i.guard_is_not) continue;
    i.run(f, i);
  }
}

size_t words_of(const Code& code) {
  return static_cast<size_t>(code.function->registers) + code.own_words;
}

// Addresses of a function's variables.
void place_variables(Frame& f) {
  const Code& code = *f.code;
  uint64_t* own = f.r + code.function->registers;
  size_t key = 0;
  for (const Variable& v : code.function->variables) {
    if (v.space == Space::shared) {
      if (key == code.keys.size()) code.keys.push_back({v.name.c_str()});
      SharedKey& mine = code.keys[key++];
      if (v.dynamic) {
        f.r[v.address] = 0;
        continue;
      }
      const auto* place = static_cast<unsigned char*>(
          f.block->static_shared(mine, v.bytes, v.alignment, std::bit_cast<Site>(&code.places[0])));
      f.r[v.address] = static_cast<uint64_t>(place - f.shared);
    } else {
      f.r[v.address] = reinterpret_cast<uint64_t>(own);
      own += (v.bytes + 7) / 8;
    }
  }
}

void call(Frame& f, const Instruction& i) {
  std::vector<uint64_t> registers(words_of(*i.callee));
  Frame inner{registers.data(), i.callee->constants.data(), i.callee, 0, f.thread, f.block,
              f.shared};
  size_t k = 0;
  for (const Variable& v : i.callee->function->params) inner.r[v.address] = raw(f, i.o[k++]);
  place_variables(inner);
  execute(inner);
}

std::string count_name(const Statement& s) {
  const std::string& first = s.words[0];
  if (first != "ld" && first != "st") return first;
  for (const char* space : {"global", "shared", "param", "local"}) {
    if (s.says(space)) return first + "." + space;
  }
  return first + ".generic";
}

// A thread's registers, kept for the next one that runs on the same fiber.
std::vector<uint64_t>& registers_of(const Thread& thread) {
  static std::unordered_map<const Thread*, std::vector<uint64_t>> all;
  return all[&thread];
}

}  // namespace

void load(const std::string& file) {
  std::ifstream in(file);
  if (!in) throw std::runtime_error("cannot read " + file);
  std::stringstream whole;
  whole << in.rdbuf();
  const std::string text = whole.str();
  constexpr std::string_view kTarget = ".target sm_";
  if (const size_t at = text.find(kTarget); at != std::string::npos) {
    settings().code_version = std::atoi(text.c_str() + at + kTarget.size());
  }
  for (auto& function : read(file, text)) {
    const std::string name = function->name;
    Code& code = codes()[name];
    code = Code{};
    code.function = std::move(function);
  }
}

void forget() {
  codes().clear();
  settings().code_version = 0;
}

std::set<std::string> unknown_instructions() {
  std::set<std::string> all;
  for (auto& [name, code] : codes()) {
    decode(code);
    for (const Instruction& i : code.instructions) {
      if (i.run == &unknown) all.insert(i.what);
    }
  }
  return all;
}

const Code* code_of(const void* kernel) {
  if (codes().empty()) return nullptr;
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) {
    throw Error("PTX: a kernel without a name");
  }
  const auto found = codes().find(info.dli_sname);
  if (found == codes().end()) throw Error(std::string("PTX: no kernel ") + info.dli_sname);
  decode(found->second);
  return &found->second;
}

void run(const Code& code, const void* const* params, const size_t* sizes, size_t count) {
  Thread& thread = current();
  Frame f{nullptr,      code.constants.data(),         &code, 0, &thread,
          thread.block, thread.block->dynamic_shared()};
  {
    const InRuntime in_runtime;
    const Function& function = *code.function;
    std::vector<uint64_t>& registers = registers_of(thread);
    registers.assign(words_of(code), ~uint64_t{0});
    f.r = registers.data();
    const auto fits = [&](size_t k) { return function.params[k].bytes == sizes[k]; };
    if (function.params.size() != count) fail(f, code.instructions[0], "other parameters");
    for (size_t k = 0; k < count; ++k) {
      if (!fits(k)) fail(f, code.instructions[0], "a parameter of another size");
      f.r[function.params[k].address] = reinterpret_cast<uint64_t>(params[k]);
    }
    place_variables(f);
  }
  execute(f);
}

std::vector<Count> take_counts() {
  std::vector<Count> taken;
  for (auto& [name, code] : codes()) {
    for (size_t k = 0; code.decoded && k < code.function->body.size(); ++k) {
      const uint64_t runs = std::exchange(code.instructions[k].runs, 0);
      const Statement& s = code.function->body[k];
      if (runs > 0) taken.push_back({count_name(s), code.function->file, s.line, runs});
    }
  }
  return taken;
}

}  // namespace cuda_emulator::ptx
