// Trellis planes with AVX-512 VBMI, GFNI and VNNI: 64 inputs a register; a label is two or three
// GF2P8AFFINEQB and one ternary XOR, a value one VPERMB in the 64 values.
//
// Four rows at a time hold their 8 to 12 matrices and 8 accumulators in registers; eight rows at a
// time have fewer loads, but the matrices become memory operands, and the loop is slower.
#pragma once

#include "trellis_lanes512.h"
#include "trellis_product.h"

namespace drop {
namespace DROP_ISA {

struct Gfni : Lanes512 {
  // Not the intrinsic: around it GCC 12 copies every accumulator twice in each round of a loop.
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(value), "v"(x));
    return sum;
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
