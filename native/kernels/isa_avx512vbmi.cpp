// AVX-512 VBMI: VPERMI2B looks 64 codes up in 128 bytes at once.
//
// A 16-bit LUT is two byte LUTs of base-128 digits (low, high), 128 entries each: four
// registers a group. Digits of two groups add up inside a byte (127 + 127), so the accumulators
// cost two adds and a shift for two groups: all bytes as 16-bit lanes, and the odd bytes alone;
// the even sums are their difference at the end. Per 64 codes: 2 look-ups, 2 sign subtractions,
// 1 mask, 4 accumulator operations; 13 micro-operations, no shuffles beside the look-ups.
#define DROP_ISA avx512vbmi
#include "x86.h"
// (x86.h first: lut.h uses what it declares.)
#include "lut.h"
#include "trellis_avx512vbmi.h"

namespace drop {
namespace avx512vbmi {

// Groups ahead of the arithmetic whose codes are prefetched; the arithmetic alone leaves too few
// loads under way. Measured on a Zen 5, four streams: 24 is 5 % slower than 40, 64 a tenth.
constexpr int64_t kAhead = 40;

DROP_INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Accumulators of bytes in 16-bit lanes; `all` wraps around, harmlessly.
struct Sums {
  __m512i all, odd;
  DROP_INLINE Sums zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  inline __attribute__((always_inline)) void add(__m512i bytes) {
    all = _mm512_add_epi16(all, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
  inline __attribute__((always_inline)) __m512i even() const {
    return _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8));
  }
};

template <int kHalfIndex>
DROP_INLINE __m512i widen(__m512i lanes) {
  return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(lanes, kHalfIndex));
}

DROP_INLINE void add_scaled(float* sums, __m512i totals, int32_t offset, float half_step) {
  const __m512i twice = _mm512_sub_epi32(_mm512_slli_epi32(totals, 1), _mm512_set1_epi32(offset));
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(twice), _mm512_set1_ps(half_step));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), scaled));
}

// 64 codes -> 64 bytes of the LUT, which has 128 bytes if sign-symmetric (`top` is V), else 256.
template <bool kSymmetric>
DROP_INLINE __m512i look_up(const uint8_t* lut, __m512i codes, __mmask64 high, __m512i top) {
  const __m512i first = _mm512_permutex2var_epi8(load(lut), codes, load(lut + 64));
  if (kSymmetric) return _mm512_mask_sub_epi8(first, high, top, first);
  return _mm512_mask_blend_epi8(high, first,
                                _mm512_permutex2var_epi8(load(lut + 128), codes, load(lut + 192)));
}

DROP_INLINE __m512i broadcast_pair(const int16_t* x) { return _mm512_set1_epi32(pair_at(x)); }

// Dot products of one group with 16 entries from entry k, plus `start`.
DROP_INLINE __m512i dots(const __m512i* x, const Codebook& codebook, int64_t k, __m512i start) {
  for (int p = 0; p < 4; ++p) {
    start = _mm512_dpwssd_epi32(
        start, x[p], _mm512_loadu_si512(codebook.pairs() + (p * codebook.entries + k) * 2));
  }
  return start;
}

struct LutBuilder {
  static int32_t group_max(const int16_t* x, const Codebook& codebook) {
    const __m512i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < codebook.entries; k += 16) {
      most = _mm512_max_epi32(most,
                              _mm512_abs_epi32(dots(pairs, codebook, k, _mm512_setzero_si512())));
    }
    return _mm512_reduce_max_epi32(most);
  }

  // 64 entries from entry k: their accumulators' bytes 3 and 2.
  DROP_INLINE void top_bytes(const __m512i* x, const Codebook& codebook, int64_t k, __m512i* third,
                             __m512i* second) {
    alignas(64) static constexpr uint8_t kPick[64] = {
        3,  7,  11, 15, 19, 23, 27, 31, 35, 39,  43,  47,  51,  55,  59,  63,
        67, 71, 75, 79, 83, 87, 91, 95, 99, 103, 107, 111, 115, 119, 123, 127,
        2,  6,  10, 14, 18, 22, 26, 30, 34, 38,  42,  46,  50,  54,  58,  62,
        66, 70, 74, 78, 82, 86, 90, 94, 98, 102, 106, 110, 114, 118, 122, 126};
    const __m512i pick = _mm512_load_si512(kPick), start = _mm512_set1_epi32(1 << 30);
    const __m512i a = dots(x, codebook, k, start), b = dots(x, codebook, k + 16, start);
    const __m512i c = dots(x, codebook, k + 32, start), d = dots(x, codebook, k + 48, start);
    const __m512i ab = _mm512_permutex2var_epi8(a, pick, b);
    const __m512i cd = _mm512_permutex2var_epi8(c, pick, d);
    *third = _mm512_shuffle_i64x2(ab, cd, 0x44);
    *second = _mm512_shuffle_i64x2(ab, cd, 0xee);
  }
};

struct Digits : LutBuilder {
  static constexpr int kBits = kBits16;
  static constexpr int64_t kGroupBytes[2] = {kHalf * 2, kEntries * 2};

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    const __m512i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    for (int64_t k = 0; k < codebook.entries; k += 64) {
      // v = accumulator >> 17: its high digit is byte 3, its low one the top of byte 2.
      __m512i high, low;
      top_bytes(pairs, codebook, k, &high, &low);
      low = _mm512_and_si512(_mm512_srli_epi16(low, 1), _mm512_set1_epi8(127));
      _mm512_storeu_si512(out + k, low);
      _mm512_storeu_si512(out + codebook.entries + k, high);
    }
  }

  template <bool kSymmetric, int kStrips>
  static void tile(const Tile& tile) {
    constexpr int64_t kLut = kGroupBytes[kSymmetric ? 0 : 1];
    const __m512i top = _mm512_set1_epi8(127);
    const int64_t count = tile.count, apart = count * kStrip;
    const uint8_t* codes = tile.codes;
    const uint8_t* lut = tile.lut;
    Sums low[kStrips], high[kStrips];
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) low[s] = high[s] = Sums::zero();
    int64_t j = 0;
    for (; j + 2 <= count; j += 2, codes += 2 * kStrip, lut += 2 * kLut) {
      const uint8_t* soon = ahead<kAhead>(tile, j);
      DROP_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const __m512i x = load(codes + s * apart), y = load(codes + s * apart + kStrip);
        _mm_prefetch(soon + s * apart, _MM_HINT_T0);
        _mm_prefetch(soon + s * apart + kStrip, _MM_HINT_T0);
        const __mmask64 x_high = _mm512_movepi8_mask(x), y_high = _mm512_movepi8_mask(y);
        low[s].add(_mm512_add_epi8(look_up<kSymmetric>(lut, x, x_high, top),
                                   look_up<kSymmetric>(lut + kLut, y, y_high, top)));
        high[s].add(_mm512_add_epi8(look_up<kSymmetric>(lut + kLut / 2, x, x_high, top),
                                    look_up<kSymmetric>(lut + kLut + kLut / 2, y, y_high, top)));
      }
    }
    if (j < count) {
      DROP_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const __m512i x = load(codes + s * apart);
        const __mmask64 x_high = _mm512_movepi8_mask(x);
        low[s].add(look_up<kSymmetric>(lut, x, x_high, top));
        high[s].add(look_up<kSymmetric>(lut + kLut / 2, x, x_high, top));
      }
    }
    const int32_t offset = static_cast<int32_t>(count) * ((1 << kBits) - 1);
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      const __m512i lows[2] = {low[s].even(), low[s].odd};
      const __m512i highs[2] = {high[s].even(), high[s].odd};
      DROP_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m512i first =
            _mm512_add_epi32(widen<0>(lows[i]), _mm512_slli_epi32(widen<0>(highs[i]), 7));
        const __m512i second =
            _mm512_add_epi32(widen<1>(lows[i]), _mm512_slli_epi32(widen<1>(highs[i]), 7));
        float* out = tile.sums + s * kStrip + i * 32;
        add_scaled(out, first, offset, tile.half_step);
        add_scaled(out + 16, second, offset, tile.half_step);
      }
    }
  }
};

struct Bytes : LutBuilder {
  static constexpr int kBits = kBits8;
  static constexpr int64_t kGroupBytes[2] = {kHalf, kEntries};

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    const __m512i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    for (int64_t k = 0; k < codebook.entries; k += 64) {
      // v = accumulator >> 23: the low 7 bits of byte 3 and the top one of byte 2.
      __m512i third, second;
      top_bytes(pairs, codebook, k, &third, &second);
      const __mmask64 one = _mm512_movepi8_mask(second);
      third = _mm512_add_epi8(third, third);
      _mm512_storeu_si512(out + k, _mm512_mask_add_epi8(third, one, third, _mm512_set1_epi8(1)));
    }
  }

  template <bool kSymmetric, int kStrips>
  static void tile(const Tile& tile) {
    constexpr int64_t kLut = kGroupBytes[kSymmetric ? 0 : 1];
    const __m512i top = _mm512_set1_epi8(-1);
    const int64_t count = tile.count, apart = count * kStrip;
    const uint8_t* codes = tile.codes;
    const uint8_t* lut = tile.lut;
    Sums total[kStrips];
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) total[s] = Sums::zero();
    for (int64_t j = 0; j < count; ++j, codes += kStrip, lut += kLut) {
      const uint8_t* soon = ahead<kAhead>(tile, j);
      DROP_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const __m512i x = load(codes + s * apart);
        _mm_prefetch(soon + s * apart, _MM_HINT_T0);
        total[s].add(look_up<kSymmetric>(lut, x, _mm512_movepi8_mask(x), top));
      }
    }
    const int32_t offset = static_cast<int32_t>(count) * ((1 << kBits) - 1);
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      const __m512i halves[2] = {total[s].even(), total[s].odd};
      DROP_UNROLL
      for (int i = 0; i < 2; ++i) {
        float* out = tile.sums + s * kStrip + i * 32;
        add_scaled(out, widen<0>(halves[i]), offset, tile.half_step);
        add_scaled(out + 16, widen<1>(halves[i]), offset, tile.half_step);
      }
    }
  }
};

}  // namespace avx512vbmi
}  // namespace drop

namespace drop {
extern const Kernel avx512vbmi_kernel;
extern const Kernel avx512vbmi_u8_kernel;
constexpr Kernel avx512vbmi_kernel =
    avx512vbmi::make_kernel<avx512vbmi::Tiled<avx512vbmi::Digits>, avx512vbmi::Gfni>(
        "avx512vbmi", "AVX-512 VBMI, GFNI, VNNI, 14-bit tables");
constexpr Kernel avx512vbmi_u8_kernel =
    avx512vbmi::make_kernel<avx512vbmi::Tiled<avx512vbmi::Bytes>, avx512vbmi::Gfni>(
        "avx512vbmi-u8", "AVX-512 VBMI, GFNI, VNNI, 8-bit tables");
}  // namespace drop
