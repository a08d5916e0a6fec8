// AVX-512BW: VPERMI2W looks 32 codes up in 64 words; two of them and a blend cover 128 entries.
//
// Entries are 16-bit words. VPERMI2W ignores all but the low 6 bits of an index word, so the even
// and the odd bytes of 64 codes are looked up in place: as they are, and shifted by 8. Four entries
// of 14 bits fit in an unsigned word; then the sums move on to 32 bits. 8-bit entries would save
// nothing here, so there are none.
#define DROP_ISA avx512bw
#include "x86.h"
// (x86.h first: lut.h uses what it declares.)
#include "lut.h"
#include "trellis_avx512bw.h"

namespace drop {
namespace avx512bw {

constexpr int64_t kAhead = 24;

DROP_INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

DROP_INLINE __m512i broadcast_pair(const int16_t* x) { return _mm512_set1_epi32(pair_at(x)); }

DROP_INLINE __m512i dots(const __m512i* x, const Codebook& codebook, int k, __m512i start) {
  for (int p = 0; p < 4; ++p) {
    const __m512i entries = _mm512_loadu_si512(codebook.pairs() + (p * codebook.entries + k) * 2);
    start = _mm512_add_epi32(start, _mm512_madd_epi16(x[p], entries));
  }
  return start;
}

// 32 index words -> 32 words; bit 6 of a code picks the half, bit 7 is the sign.
template <bool kSymmetric>
DROP_INLINE __m512i look_up(const uint8_t* lut, __m512i index, __mmask32 bit6, __mmask32 bit7,
                            __m512i top) {
  const __m512i first =
      _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(load(lut), index, load(lut + 64)),
                              _mm512_permutex2var_epi16(load(lut + 128), index, load(lut + 192)));
  if (kSymmetric) return _mm512_mask_sub_epi16(first, bit7, top, first);
  const __m512i second = _mm512_mask_blend_epi16(
      bit6, _mm512_permutex2var_epi16(load(lut + 256), index, load(lut + 320)),
      _mm512_permutex2var_epi16(load(lut + 384), index, load(lut + 448)));
  return _mm512_mask_blend_epi16(bit7, first, second);
}

struct Words {
  static constexpr int kBits = kBits16;
  static constexpr int64_t kGroupBytes[2] = {kHalf * 2, kEntries * 2};

  static int32_t group_max(const int16_t* x, const Codebook& codebook) {
    const __m512i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    __m512i most = _mm512_setzero_si512();
    for (int k = 0; k < codebook.entries; k += 16) {
      most = _mm512_max_epi32(most,
                              _mm512_abs_epi32(dots(pairs, codebook, k, _mm512_setzero_si512())));
    }
    return _mm512_reduce_max_epi32(most);
  }

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    const __m512i pairs[4] = {broadcast_pair(x), broadcast_pair(x + 2), broadcast_pair(x + 4),
                              broadcast_pair(x + 6)};
    const __m512i start = _mm512_set1_epi32(1 << 30);
    for (int k = 0; k < codebook.entries; k += 16) {
      const __m512i v = _mm512_srli_epi32(dots(pairs, codebook, k, start), 31 - kBits);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * k), _mm512_cvtepi32_epi16(v));
    }
  }

  template <bool kSymmetric, int kStrips>
  static void tile(const Tile& tile) {
    if constexpr (kStrips <= 2) {
      narrow<kSymmetric, kStrips>(tile);
    } else {  // two strips fill the registers
      narrow<kSymmetric, 2>(tile.part(0, 2, kStrips));
      narrow<kSymmetric, kStrips - 2>(tile.part(2, 2, kStrips));
    }
  }

  template <bool kSymmetric, int kStrips>
  static void narrow(const Tile& tile) {
    constexpr int64_t kLut = kGroupBytes[kSymmetric ? 0 : 1];
    const __m512i top = _mm512_set1_epi16((1 << kBits) - 1);
    const __m512i low_word = _mm512_set1_epi32(0xffff);
    const __m512i even6 = _mm512_set1_epi16(0x40), even7 = _mm512_set1_epi16(0x80);
    const __m512i odd6 = _mm512_set1_epi16(0x4000), zero = _mm512_setzero_si512();
    const int64_t count = tile.count, apart = count * kStrip;
    const uint8_t* codes = tile.codes;
    const uint8_t* lut = tile.lut;
    __m512i totals[kStrips][2][2];  // [strip][even or odd code][even or odd word]
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      totals[s][0][0] = totals[s][0][1] = totals[s][1][0] = totals[s][1][1] = zero;
    }
    for (int64_t j = 0; j < count;) {
      const int64_t stop = j + 4 < count ? j + 4 : count;
      __m512i words[kStrips][2];
      DROP_UNROLL
      for (int s = 0; s < kStrips; ++s) words[s][0] = words[s][1] = zero;
      for (; j < stop; ++j, codes += kStrip, lut += kLut) {
        const uint8_t* soon = ahead<kAhead>(tile, j);
        DROP_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          const __m512i x = load(codes + s * apart), y = _mm512_srli_epi16(x, 8);
          _mm_prefetch(soon + s * apart, _MM_HINT_T0);
          words[s][0] = _mm512_add_epi16(
              words[s][0], look_up<kSymmetric>(lut, x, _mm512_test_epi16_mask(x, even6),
                                               _mm512_test_epi16_mask(x, even7), top));
          words[s][1] = _mm512_add_epi16(
              words[s][1], look_up<kSymmetric>(lut, y, _mm512_test_epi16_mask(x, odd6),
                                               _mm512_movepi16_mask(x), top));
        }
      }
      DROP_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        DROP_UNROLL
        for (int i = 0; i < 2; ++i) {
          totals[s][i][0] =
              _mm512_add_epi32(totals[s][i][0], _mm512_and_si512(words[s][i], low_word));
          totals[s][i][1] = _mm512_add_epi32(totals[s][i][1], _mm512_srli_epi32(words[s][i], 16));
        }
      }
    }
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(count) * ((1 << kBits) - 1));
    // Even and odd words are rows 0, 2, .. and 1, 3, ..: interleave.
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    DROP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      DROP_UNROLL
      for (int i = 0; i < 2; ++i) {
        DROP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const __m512i sum =
              _mm512_permutex2var_epi32(totals[s][i][0], h ? second : first, totals[s][i][1]);
          const __m512i twice = _mm512_sub_epi32(_mm512_slli_epi32(sum, 1), offset);
          const __m512 scaled =
              _mm512_mul_ps(_mm512_cvtepi32_ps(twice), _mm512_set1_ps(tile.half_step));
          float* out = tile.sums + s * kStrip + 32 * i + 16 * h;
          _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), scaled));
        }
      }
    }
  }
};

typedef Nibbles<Bytes64> Planes;

}  // namespace avx512bw

extern const Kernel avx512bw_kernel;
constexpr Kernel avx512bw_kernel =
    avx512bw::make_kernel<avx512bw::Tiled<avx512bw::Words>, avx512bw::Planes>(
        "avx512bw", "AVX-512BW, 14-bit tables");
}  // namespace drop
