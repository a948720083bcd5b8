// Which instruction set this CPU and its system run.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace accel_cpu {
namespace {

struct Features {
  bool avx2 = false;
  bool avx512vnni = false;
  bool avx512bf16 = false;
};

Features detect() {
  Features found;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return found;
  const bool fma = (c & bit_FMA) != 0 && (c & bit_F16C) != 0;
  unsigned state, high;
  __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  if ((state & 0x6) != 0x6 || !fma || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = (b & bit_AVX2) != 0;
  constexpr unsigned kFoundation = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  constexpr unsigned kVnni = 1u << 11;
  found.avx512vnni = found.avx2 && (state & 0xe0) == 0xe0 && (b & kFoundation) == kFoundation && (c & kVnni) != 0;
  if (!found.avx512vnni || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
  constexpr unsigned kBrainFloats = 1u << 5;
  found.avx512bf16 = (a & kBrainFloats) != 0;
#endif
  return found;
}

}  // namespace

const KernelTable* choose_kernels(const char** error) {
  const Features features = detect();
  const KernelTable* tables[] = {features.avx512bf16 ? avx512_bf16_kernels() : nullptr,
                                 features.avx512vnni ? avx512_kernels() : nullptr,
                                 features.avx2 ? avx2_kernels() : nullptr, portable_kernels()};
  const char* wanted = getenv("ACCEL_CPU_ISA");
  for (const KernelTable* table : tables) {
    if (table != nullptr && (wanted == nullptr || wanted[0] == '\0' || strcmp(wanted, table->name) == 0)) {
      return table;
    }
  }
  *error =
      "ACCEL_CPU_ISA names no instruction set that this CPU runs; use avx512bf16, avx512vnni, avx2 or portable, or unset "
      "it";
  return nullptr;
}

}  // namespace accel_cpu
