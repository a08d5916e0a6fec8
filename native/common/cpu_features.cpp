#include "cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace drop {
namespace {

uint32_t detect() {
  uint32_t found = 0;
#if defined(__x86_64__) || defined(_M_X64)
  // __builtin_cpu_supports takes literals only; it asks the operating system, too.
  if (__builtin_cpu_supports("avx2")) found |= kAvx2;
  if (__builtin_cpu_supports("fma")) found |= kFma;
  if (__builtin_cpu_supports("avx512f")) found |= kAvx512f;
  if (__builtin_cpu_supports("avx512bw")) found |= kAvx512bw;
  if (__builtin_cpu_supports("avx512dq")) found |= kAvx512dq;
  if (__builtin_cpu_supports("avx512vl")) found |= kAvx512vl;
  if (__builtin_cpu_supports("avx512vbmi")) found |= kAvx512vbmi;
  if (__builtin_cpu_supports("avx512vnni")) found |= kAvx512vnni;
  if (__builtin_cpu_supports("gfni")) found |= kGfni;
  unsigned a, b, c, d;  // compilers learned "f16c" (Clang) and "avxvnni" late
  if ((found & kAvx2) && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1)) found |= kF16c;
  if ((found & kAvx2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) found |= kAvxVnni;
#elif defined(__linux__) && defined(__aarch64__)
  if (getauxval(AT_HWCAP) >> 20 & 1) found |= kDotProduct;  // HWCAP_ASIMDDP
#elif defined(__ARM_FEATURE_DOTPROD)
  found |= kDotProduct;  // the compiler's own processors have it: those of Apple
#endif
  return found;
}

}  // namespace

bool runs_here(uint32_t features) {
  static const uint32_t found = detect();
  return (features & ~found) == 0;
}

}  // namespace drop
