// What trellis planes need of any AVX-512 (trellis_product.h).
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

struct Lanes512 {
  typedef __m512i Vec;
  typedef __m512i Acc;
  static constexpr int64_t kWidth = 64;
  static constexpr int kOffset = 64;
  static constexpr int64_t kRows = 2;

  DROP_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  DROP_INLINE void store(uint8_t* p, Vec v) { _mm512_store_si512(p, v); }
  DROP_INLINE Acc zero() { return _mm512_setzero_si512(); }

  // Eight sums of lanes by a tree of three levels.
  DROP_INLINE void sum_lanes(const Acc* sums, int32_t* low, int32_t* high) {
    __m512i pairs[4], fours[2];
    DROP_UNROLL
    for (int i = 0; i < 4; ++i) {
      pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]),
                                  _mm512_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]));
    }
    DROP_UNROLL
    for (int i = 0; i < 2; ++i) {
      fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                  _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    }
    const __m512i quarters = _mm512_add_epi32(_mm512_shuffle_i64x2(fours[0], fours[1], 0x88),
                                              _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd));
    // Quarters of 4 sums: low, low, high, high.
    const __m512i swapped = _mm512_shuffle_i64x2(quarters, quarters, _MM_SHUFFLE(2, 3, 0, 1));
    const __m512i all = _mm512_add_epi32(quarters, swapped);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_castsi512_si128(all));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_extracti32x4_epi32(all, 2));
  }
};

}  // namespace DROP_ISA
}  // namespace drop
