// Trellis planes with AVX-512 VBMI, GFNI and VNNI: 64 inputs a register; a label is two or three
// GF2P8AFFINEQB and one ternary XOR, a value one VPERMB in the 64 values.
//
// Four rows at a time hold their 8 to 12 matrices and 8 accumulators in registers; eight rows at a
// time have fewer loads, but the matrices become memory operands, and the loop is slower.
#pragma once

#include "trellis_product.h"

namespace drop {
namespace DROP_ISA {

struct Gfni {
  typedef __m512i Vec;
  typedef __m512i Acc;
  static constexpr int64_t kWidth = 64;
  static constexpr int kOffset = 64;
  static constexpr int64_t kRows = 2;

  DROP_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  DROP_INLINE void store(uint8_t* p, Vec v) { _mm512_store_si512(p, v); }
  DROP_INLINE Acc zero() { return _mm512_setzero_si512(); }

  // Not the intrinsic: around it GCC 12 copies every accumulator twice in each round of a loop.
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(value), "v"(x));
    return sum;
  }

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

  // kOldest: the first rows, whose windows reach the third byte.
  template <int kOldest, typename Sink>
  DROP_INLINE void walk_as(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                           const Sink& sink) {
    const TrellisQuad& quad = bytes.book->quads[bytes.half];
    const Vec table = load(bytes.book->raised);
    const uint8_t *newest = bytes.rows[0], *second = bytes.rows[1], *third = bytes.rows[2];
    Vec matrices[kSpan][kQuad];
    DROP_UNROLL
    for (int lag = 0; lag < kSpan; ++lag) {
      DROP_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        matrices[lag][i] = _mm512_set1_epi64(static_cast<int64_t>(quad.matrix[lag][i]));
      }
    }
    for (int64_t j = first; j < last; j += kLine) {
      const Vec a = load(newest + j), b = load(second + j), c = load(third + j);
      ahead.step();
      Vec values[kQuad];
      DROP_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        const Vec x = _mm512_gf2p8affine_epi64_epi8(a, matrices[0][i], 0);
        const Vec y = _mm512_gf2p8affine_epi64_epi8(b, matrices[1][i], 0);
        Vec label;
        if (i < kOldest) {
          const Vec z = _mm512_gf2p8affine_epi64_epi8(c, matrices[2][i], 0);
          label = _mm512_ternarylogic_epi64(x, y, z, 0x96);
        } else {
          label = _mm512_xor_si512(x, y);
        }
        values[i] = _mm512_permutexvar_epi8(label, table);
      }
      sink(j, values);
    }
  }

  template <typename Sink>
  DROP_INLINE void walk(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                        const Sink& sink) {
    switch (bytes.half ? bytes.book->oldest_high : bytes.book->oldest) {
      case 0: return walk_as<0>(bytes, first, last, ahead, sink);
      case 1: return walk_as<1>(bytes, first, last, ahead, sink);
      case 2: return walk_as<2>(bytes, first, last, ahead, sink);
      case 3: return walk_as<3>(bytes, first, last, ahead, sink);
      default: return walk_as<4>(bytes, first, last, ahead, sink);
    }
  }
};

}  // namespace DROP_ISA
}  // namespace drop
