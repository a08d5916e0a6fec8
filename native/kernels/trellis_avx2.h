// Trellis planes with AVX2: 32 inputs a register; VPSHUFB looks labels up by half bytes, and values
// in the four rows of 16 labels, whose XOR differences need no blends (isa_avx2.cpp explains how).
#pragma once

#include "trellis_nibbles.h"

namespace drop {
namespace DROP_ISA {

struct Bytes32 {
  typedef __m256i Vec;
  typedef __m256i Acc;
  static constexpr int64_t kWidth = 32;
  static constexpr int kOffset = 64;
  static constexpr int64_t kRows = 1;

  DROP_INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  DROP_INLINE void store(uint8_t* p, Vec v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
  }
  DROP_INLINE void pin(Vec& v) { asm("" : "+x"(v)); }
  DROP_INLINE Vec low(Vec v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  DROP_INLINE Vec high(Vec v) { return low(_mm256_srli_epi16(v, 4)); }
  DROP_INLINE Vec bit_xor(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
  DROP_INLINE Vec shuffle(const uint8_t* table, Vec index) {
    return _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))),
        index);
  }
  DROP_INLINE Vec values(const Trellis& book, Vec label) {
    const Vec sixteen = _mm256_set1_epi8(16);
    Vec value = shuffle(book.steps[0], label);
    DROP_UNROLL
    for (int row = 1; row < 4; ++row) {
      label = _mm256_sub_epi8(label, sixteen);
      value = bit_xor(value, shuffle(book.steps[row], label));
    }
    return value;
  }
  DROP_INLINE Acc zero() { return _mm256_setzero_si256(); }
  // Sums of two products fit 16 bits: 2 * 127 * 128 < 2^15.
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, value, x);
#else
    const Vec pairs = _mm256_maddubs_epi16(value, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  DROP_INLINE __m128i sum_four(const Acc* sums) {
    const Acc all =
        _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
  DROP_INLINE void sum_lanes(const Acc* sums, int32_t* low, int32_t* high) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), sum_four(sums));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), sum_four(sums + kQuad));
  }
};

#ifdef __GFNI__
// Labels as in trellis_avx512vbmi.h; the matrices stay in memory.
struct Planes : Bytes32 {
  template <bool kThree, typename Sink>
  DROP_INLINE void walk_as(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                           const Sink& sink) {
    const TrellisQuad& quad = bytes.book->quads[bytes.half];
    const auto affine = [&](Vec byte, int lag, int i) __attribute__((always_inline)) {
      const Vec matrix = _mm256_set1_epi64x(static_cast<int64_t>(quad.matrix[lag][i]));
      return _mm256_gf2p8affine_epi64_epi8(byte, matrix, 0);
    };
    for (int64_t line = first; line < last; line += kLine) {
      ahead.step();
      for (int64_t j = line; j < line + kLine; j += kWidth) {
        const Vec a = load(bytes.rows[0] + j), b = load(bytes.rows[1] + j);
        const Vec c = load(bytes.rows[2] + j);
        Vec found[kQuad];
        DROP_UNROLL
        for (int i = 0; i < kQuad; ++i) {
          Vec label = bit_xor(affine(a, 0, i), affine(b, 1, i));
          if (kThree) label = bit_xor(label, affine(c, 2, i));
          pin(label);
          found[i] = values(*bytes.book, label);
          pin(found[i]);
        }
        sink(j, found);
      }
    }
  }

  template <typename Sink>
  DROP_INLINE void walk(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                        const Sink& sink) {
    if (bytes.half ? bytes.book->oldest_high : bytes.book->oldest) {
      walk_as<true>(bytes, first, last, ahead, sink);
    } else {
      walk_as<false>(bytes, first, last, ahead, sink);
    }
  }
};
#else
typedef Nibbles<Bytes32> Planes;
#endif

}  // namespace DROP_ISA
}  // namespace drop
