#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace gplws::cpu {
namespace {

Isa supported_isa() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the registers (XCR0).
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  return Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

Isa requested_isa() {
  const char* name = std::getenv("GPLWS_CPU_ISA");
  if (name == nullptr) return Isa::kAvx512;
  if (std::strcmp(name, "baseline") == 0) return Isa::kBaseline;
  if (std::strcmp(name, "avx2") == 0) return Isa::kAvx2;
  return Isa::kAvx512;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = [] {
    const Isa supported = supported_isa();
    const Isa requested = requested_isa();
    return requested < supported ? requested : supported;
  }();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

bool cpu_has_avx512bf16() {
#if defined(__x86_64__)
  return cpu_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace gplws::cpu
