// Trellis planes with AVX-512BW alone: as with AVX2 (trellis_avx2.h), 64 inputs a register.
#pragma once

#include "trellis_lanes512.h"
#include "trellis_nibbles.h"

namespace drop {
namespace DROP_ISA {

struct Bytes64 : Lanes512 {
  DROP_INLINE void pin(Vec& v) { asm("" : "+v"(v)); }
  DROP_INLINE Vec low(Vec v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  DROP_INLINE Vec high(Vec v) { return low(_mm512_srli_epi16(v, 4)); }
  DROP_INLINE Vec bit_xor(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
  DROP_INLINE Vec shuffle(const uint8_t* table, Vec index) {
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  DROP_INLINE Vec values(const Trellis& book, Vec label) {
    const Vec sixteen = _mm512_set1_epi8(16);
    Vec value = shuffle(book.steps[0], label);
    DROP_UNROLL
    for (int row = 1; row < 4; ++row) {
      label = _mm512_sub_epi8(label, sixteen);
      value = bit_xor(value, shuffle(book.steps[row], label));
    }
    return value;
  }
  // Sums of two products fit 16 bits: 2 * 127 * 128 < 2^15.
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
    const Vec pairs = _mm512_maddubs_epi16(value, x);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace DROP_ISA
}  // namespace drop
