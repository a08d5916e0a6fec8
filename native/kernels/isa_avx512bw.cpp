// AVX-512BW: VPERMI2W looks 32 codes up in 64 words; two of them and a blend cover 128 entries.
//
// Tables are 16-bit words. It ignores all but the low 6 bits of an index word, so the even and the
// odd bytes of 64 codes are looked up in place: as they are, and shifted by 8. Four entries of 14
// bits fit in an unsigned word; then the sums move on to 32 bits. 8-bit tables would save nothing
// here, so there are none.
#define DROP_ISA avx512bw
#include "x86.h"
// After x86.h:
#include "tables.h"

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
DROP_INLINE __m512i look_up(const uint8_t* table, __m512i index, __mmask32 bit6, __mmask32 bit7,
                            __m512i top) {
  const __m512i first = _mm512_mask_blend_epi16(
      bit6, _mm512_permutex2var_epi16(load(table), index, load(table + 64)),
      _mm512_permutex2var_epi16(load(table + 128), index, load(table + 192)));
  if (kSymmetric) return _mm512_mask_sub_epi16(first, bit7, top, first);
  const __m512i second = _mm512_mask_blend_epi16(
      bit6, _mm512_permutex2var_epi16(load(table + 256), index, load(table + 320)),
      _mm512_permutex2var_epi16(load(table + 384), index, load(table + 448)));
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
      most = _mm512_max_epi32(
          most, _mm512_abs_epi32(dots(pairs, codebook, k, _mm512_setzero_si512())));
    }
    return _mm512_reduce_max_epi32(most);
  }

  static void group_table(const int16_t* x, const Codebook& codebook, uint8_t* out) {
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
    DROP_UNROLL
    for (int s = 0; s < kStrips; s += 2) {  // two strips fill the registers
      pair<kSymmetric, (kStrips - 1 > 0 ? 2 : 1)>(tile, s < kStrips - 1 ? s : kStrips - 1);
    }
  }

  template <bool kSymmetric, int kStrips>
  static void pair(const Tile& tile, int64_t first_strip) {
    constexpr int64_t kTable = kGroupBytes[kSymmetric ? 0 : 1];
    const __m512i top = _mm512_set1_epi16((1 << kBits) - 1);
  }
};

}  // namespace avx512bw

static bool has_avx512bw() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

extern const Kernel avx512bw_kernel;
constexpr Kernel avx512bw_kernel =
    avx512bw::make_kernel<avx512bw::Tiled<avx512bw::Words>>("avx512bw", "AVX-512BW, 14-bit tables", has_avx512bw);
}  // namespace drop
