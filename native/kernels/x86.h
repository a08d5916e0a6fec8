// Helpers shared by the x86 files, inside the namespace of each (see scalar.h for why).
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

// Squared norms of groups of 8 int16, a multiple of 4 groups.
DROP_INLINE void squared_norms(const int16_t* x, int64_t count, int32_t* norms) {
  for (int64_t j = 0; j < count; j += 4) {
    __m128i sums[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i group = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + (j + i) * kGroup));
      sums[i] = _mm_madd_epi16(group, group);
    }
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(norms + j),
        _mm_hadd_epi32(_mm_hadd_epi32(sums[0], sums[1]), _mm_hadd_epi32(sums[2], sums[3])));
  }
}

DROP_INLINE int32_t pair_at(const int16_t* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return pair;
}

}  // namespace DROP_ISA
}  // namespace drop
