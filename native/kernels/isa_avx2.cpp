// AVX2: no instruction looks up more than 16 bytes, so 128 entries take a ladder of 8 VPSHUFB.
//
// VPSHUFB gives 0 where the top bit of an index is set. With x in 0..127, x - 16 i is negative
// exactly while row i of the LUT lies above x; so with differences D_0 = T_0 and
// D_i = T_i xor T_(i-1), the xor over i of shuffle(D_i, x - 16 i) telescopes to T_(x / 16)[x % 16].
// Three operations a row of the LUT and no blends (which cost two or three each on Intel).
// The LUT is stored as these differences. Digits and accumulators are as in
// isa_avx512vbmi.cpp; 16-bit LUTs share the eight indices between the two digits.
#ifndef DROP_ISA  // isa_avx2_gfni.cpp defines it
#define DROP_ISA avx2
#endif
#include "x86.h"
// (x86.h first: lut.h uses what it declares.)
#include "lut.h"
#include "trellis_avx2.h"

namespace drop {
namespace DROP_ISA {

constexpr int64_t kAhead = 24;

DROP_INLINE __m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

DROP_INLINE __m256i load_row(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct Sums {
  __m256i all, odd;
  DROP_INLINE Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  inline __attribute__((always_inline)) void add(__m256i bytes) {
    all = _mm256_add_epi16(all, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  inline __attribute__((always_inline)) __m256i even() const {
    return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
  }
};

DROP_INLINE void add_scaled(float* sums, __m256i totals, int32_t offset, float half_step) {
  const __m256i twice = _mm256_sub_epi32(_mm256_slli_epi32(totals, 1), _mm256_set1_epi32(offset));
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(twice), _mm256_set1_ps(half_step));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), scaled));
}

template <int kHalfIndex>
DROP_INLINE __m256i widen(__m256i lanes) {
  return _mm256_cvtepu16_epi32(_mm256_extracti128_si256(lanes, kHalfIndex));
}

// With 16 registers the order of a ladder must stay as written: the compiler would rather compute
// all indices at once and regroup the sums, and keep what does not fit on the stack.
DROP_INLINE void pin(__m256i& value) { asm("" : "+x"(value)); }

// 32 indices 0..127 -> 32 bytes of each of kLuts LUTs, which lie `apart` bytes apart.
template <int kLuts>
DROP_INLINE void ladder(const uint8_t* lut, int64_t apart, __m256i index, __m256i* out) {
  const __m256i sixteen = _mm256_set1_epi8(16);
  DROP_UNROLL
  for (int t = 0; t < kLuts; ++t) {
    out[t] = _mm256_shuffle_epi8(load_row(lut + t * apart), index);
  }
  DROP_UNROLL
  for (int row = 1; row < 8; ++row) {
    index = _mm256_sub_epi8(index, sixteen);
    pin(index);
    DROP_UNROLL
    for (int t = 0; t < kLuts; ++t) {
      out[t] = _mm256_xor_si256(out[t],
                                _mm256_shuffle_epi8(load_row(lut + t * apart + row * 16), index));
      pin(out[t]);
    }
  }
}

// 32 codes -> 32 bytes of each digit's LUT; `top` is V of one digit.
template <bool kSymmetric, int kLuts>
DROP_INLINE void look_up(const uint8_t* lut, __m256i codes, __m256i top, __m256i* out) {
  constexpr int64_t kApart = kSymmetric ? kHalf : kEntries;
  const __m256i index = _mm256_and_si256(codes, _mm256_set1_epi8(127));
  const __m256i high = _mm256_cmpgt_epi8(_mm256_setzero_si256(), codes);
  ladder<kLuts>(lut, kApart, index, out);
  if (kSymmetric) {
    const __m256i flip = _mm256_and_si256(high, top);
    DROP_UNROLL
    for (int t = 0; t < kLuts; ++t) out[t] = _mm256_xor_si256(out[t], flip);
  } else {
    __m256i upper[kLuts];
    ladder<kLuts>(lut + kHalf, kApart, index, upper);
    DROP_UNROLL
    for (int t = 0; t < kLuts; ++t) out[t] = _mm256_blendv_epi8(out[t], upper[t], high);
  }
}

DROP_INLINE __m256i broadcast_pair(const int16_t* x) { return _mm256_set1_epi32(pair_at(x)); }

DROP_INLINE __m256i dots(const __m256i* x, const Codebook& codebook, int k, __m256i start) {
  for (int p = 0; p < 4; ++p) {
    const __m256i entries = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(codebook.pairs() + (p * codebook.entries + k) * 2));
    start = _mm256_add_epi32(start, _mm256_madd_epi16(x[p], entries));
  }
  return start;
}

template <int kDigits>
struct Ladder {
  static constexpr int kBits = kDigits == 2 ? kBits16 : kBits8;
  static constexpr int64_t kGroupBytes[2] = {kHalf * kDigits, kEntries * kDigits};

  static int32_t group_max(const int16_t* x, const Codebook& codebook) {
    const __m256i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    __m256i most = _mm256_setzero_si256();
    for (int k = 0; k < codebook.entries; k += 8) {
      most = _mm256_max_epi32(most,
                              _mm256_abs_epi32(dots(pairs, codebook, k, _mm256_setzero_si256())));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    int32_t top = 0;
    DROP_UNROLL
    for (int i = 0; i < 8; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
  }

  // 32 entries from entry k as 16-bit words v, in the lane order that `_mm256_packus_epi16` and
  // the permutation below put right.
  DROP_INLINE __m256i in_order(__m256i low, __m256i high) {
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    const __m256i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    const __m256i start = _mm256_set1_epi32(1 << 30), digit = _mm256_set1_epi16(127);
    for (int k = 0; k < codebook.entries; k += 32) {
      __m256i words[2];
      DROP_UNROLL
      for (int i = 0; i < 2; ++i) {
        words[i] = _mm256_packus_epi32(
            _mm256_srli_epi32(dots(pairs, codebook, k + 16 * i, start), 31 - kBits),
            _mm256_srli_epi32(dots(pairs, codebook, k + 16 * i + 8, start), 31 - kBits));
      }
      __m256i* to = reinterpret_cast<__m256i*>(out + k);
      if (kDigits == 1) {
        _mm256_storeu_si256(to, in_order(words[0], words[1]));
      } else {
        _mm256_storeu_si256(
            to, in_order(_mm256_and_si256(words[0], digit), _mm256_and_si256(words[1], digit)));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out + codebook.entries + k),
            in_order(_mm256_srli_epi16(words[0], 7), _mm256_srli_epi16(words[1], 7)));
      }
    }
    // Rows -> differences, one ladder of 8 rows at a time, from its last row down.
    for (uint8_t* lut = out; lut < out + codebook.entries * kDigits; lut += kHalf) {
      DROP_UNROLL
      for (int row = 7; row > 0; --row) {
        __m128i* here = reinterpret_cast<__m128i*>(lut + row * 16);
        _mm_storeu_si128(here, _mm_xor_si128(_mm_loadu_si128(here), _mm_loadu_si128(here - 1)));
      }
    }
  }

  template <bool kSymmetric, int kStrips>
  static void tile(const Tile& tile) {
    constexpr int kWidth = kDigits == 1 && kStrips > 1 ? 2 : 1;  // as many as registers allow
    int s = 0;
    for (; s + kWidth <= kStrips; s += kWidth) {
      narrow<kSymmetric, kWidth>(tile.part(s, kWidth, kStrips));
    }
    if (s < kStrips) narrow<kSymmetric, 1>(tile.part(s, 1, kStrips));
  }

  // A strip is two registers. Digits of two groups are added as bytes first; whole bytes cannot.
  template <bool kSymmetric, int kStrips>
  static void narrow(const Tile& tile) {
    constexpr int64_t kLut = kGroupBytes[kSymmetric ? 0 : 1];
    constexpr int kParts = 2 * kStrips;
    const __m256i top = _mm256_set1_epi8(kDigits == 2 ? 127 : -1);
    const int64_t count = tile.count, apart = count * kStrip;
    const uint8_t* codes = tile.codes;
    const uint8_t* lut = tile.lut;
    Sums totals[kParts][kDigits];
    DROP_UNROLL
    for (int h = 0; h < kParts; ++h) {
      DROP_UNROLL
      for (int d = 0; d < kDigits; ++d) totals[h][d] = Sums::zero();
    }
    int64_t j = 0;
    if (kDigits == 2) {
      for (; j + 2 <= count; j += 2, codes += 2 * kStrip, lut += 2 * kLut) {
        const uint8_t* soon = ahead<kAhead>(tile, j);
        DROP_UNROLL
        for (int h = 0; h < kParts; ++h) {
          const int64_t at = h / 2 * apart + h % 2 * 32;
          __m256i a[kDigits], b[kDigits];
          _mm_prefetch(soon + h / 2 * apart + h % 2 * kStrip, _MM_HINT_T0);
          look_up<kSymmetric, kDigits>(lut, load(codes + at), top, a);
          look_up<kSymmetric, kDigits>(lut + kLut, load(codes + at + kStrip), top, b);
          DROP_UNROLL
          for (int d = 0; d < kDigits; ++d) totals[h][d].add(_mm256_add_epi8(a[d], b[d]));
        }
      }
    }
    for (; j < count; ++j, codes += kStrip, lut += kLut) {
      const uint8_t* soon = ahead<kAhead>(tile, j);
      DROP_UNROLL
      for (int h = 0; h < kParts; ++h) {
        const int64_t at = h / 2 * apart + h % 2 * 32;
        __m256i a[kDigits];
        if (h % 2 == 0) _mm_prefetch(soon + h / 2 * apart, _MM_HINT_T0);
        look_up<kSymmetric, kDigits>(lut, load(codes + at), top, a);
        DROP_UNROLL
        for (int d = 0; d < kDigits; ++d) totals[h][d].add(a[d]);
      }
    }
    const int32_t offset = static_cast<int32_t>(count) * ((1 << kBits) - 1);
    DROP_UNROLL
    for (int h = 0; h < kParts; ++h) {
      DROP_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        float* out = tile.sums + h / 2 * kStrip + h % 2 * 16 + odd * 32;
        __m256i first = _mm256_setzero_si256(), second = first;
        DROP_UNROLL
        for (int d = kDigits - 1; d >= 0; --d) {  // most significant digit first
          const __m256i lanes = odd ? totals[h][d].odd : totals[h][d].even();
          first = _mm256_add_epi32(_mm256_slli_epi32(first, 7), widen<0>(lanes));
          second = _mm256_add_epi32(_mm256_slli_epi32(second, 7), widen<1>(lanes));
        }
        add_scaled(out, first, offset, tile.half_step);
        add_scaled(out + 8, second, offset, tile.half_step);
      }
    }
  }
};

extern const Kernel kernel;
extern const Kernel u8_kernel;
constexpr Kernel kernel = make_kernel<Tiled<Ladder<2>>, Planes>("avx2", "AVX2, 14-bit tables");
constexpr Kernel u8_kernel = make_kernel<Tiled<Ladder<1>>, Planes>("avx2-u8", "AVX2, 8-bit tables");

}  // namespace DROP_ISA
}  // namespace drop
