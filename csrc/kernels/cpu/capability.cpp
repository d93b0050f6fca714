#include "kernels/cpu/capability.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels/info.h"

namespace batchops {
namespace {

constexpr const char* kVariable = "BATCHOPS_CPU_CAPABILITY";

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "default";
}

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  // Every processor with AVX2 and FMA has F16C as well, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa machine = best();
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return machine;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, name_of(isa)) == 0) return isa < machine ? isa : machine;
  }
  std::fprintf(stderr,
               "batchops: %s must be \"avx512\", \"avx2\" or \"default\", got \"%s\"; using "
               "\"%s\", the best of this machine\n",
               kVariable, wanted, name_of(machine));
  return machine;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

#if defined(__x86_64__)
const bool has_avx512_bf16 = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
const bool has_avx512_bf16 = false;
#endif

const char* cpu_capability() { return name_of(isa()); }

}  // namespace batchops
