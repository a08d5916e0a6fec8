// NEON (AArch64): TBL with four registers looks 16 codes up in 64 bytes, TBX with the next four
// completes 128. Both leave alone what is out of range, so no blend is needed. Digits and
// accumulators as in isa_avx512vbmi.cpp; USRA adds the shifted odd bytes in one instruction.
#ifndef DROP_ISA  // isa_neon_dotprod.cpp defines it
#define DROP_ISA neon
#endif
#include <arm_neon.h>

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

// Squared norms of groups of 8 int16, a multiple of 4 groups.
DROP_INLINE void squared_norms(const int16_t* x, int64_t count, int32_t* norms) {
  for (int64_t j = 0; j < count; j += 4) {
    int32x4_t sums[4];
    DROP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int16x8_t group = vld1q_s16(x + (j + i) * kGroup);
      sums[i] = vmlal_high_s16(vmull_s16(vget_low_s16(group), vget_low_s16(group)), group, group);
    }
    vst1q_s32(norms + j, vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
  }
}

}  // namespace DROP_ISA
}  // namespace drop

#include "lut.h"
#include "trellis_neon.h"

namespace drop {
namespace DROP_ISA {

constexpr int64_t kAhead = 24;  // groups

struct Sums {
  uint16x8_t all, odd;
  DROP_INLINE Sums zero() { return {vdupq_n_u16(0), vdupq_n_u16(0)}; }
  inline __attribute__((always_inline)) void add(uint8x16_t bytes) {
    all = vaddq_u16(all, vreinterpretq_u16_u8(bytes));
    odd = vsraq_n_u16(odd, vreinterpretq_u16_u8(bytes), 8);
  }
  inline __attribute__((always_inline)) uint16x8_t even() const {
    return vsubq_u16(all, vshlq_n_u16(odd, 8));
  }
};

DROP_INLINE void add_scaled(float* sums, uint32x4_t totals, int32_t offset, float half_step) {
  const int32x4_t twice =
      vsubq_s32(vreinterpretq_s32_u32(vshlq_n_u32(totals, 1)), vdupq_n_s32(offset));
  vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vmulq_n_f32(vcvtq_f32_s32(twice), half_step)));
}

DROP_INLINE uint8x16_t look_up_half(const uint8_t* lut, uint8x16_t index) {
  const uint8x16_t low = vqtbl4q_u8(vld1q_u8_x4(lut), index);
  return vqtbx4q_u8(low, vld1q_u8_x4(lut + 64), vsubq_u8(index, vdupq_n_u8(64)));
}

// 16 codes -> 16 bytes of the LUT.
template <bool kSymmetric>
DROP_INLINE uint8x16_t look_up(const uint8_t* lut, uint8x16_t codes, uint8x16_t top) {
  const uint8x16_t index = vandq_u8(codes, vdupq_n_u8(127));
  const uint8x16_t high = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(codes), 7));
  const uint8x16_t first = look_up_half(lut, index);
  if (kSymmetric) return veorq_u8(first, vandq_u8(high, top));
  return vbslq_u8(high, look_up_half(lut + kHalf, index), first);
}

// Dot products of one group with 8 entries from entry k, plus `start`.
DROP_INLINE int32x4x2_t dots(const int16_t* x, const Codebook& codebook, int k, int32_t start) {
  int32x4x2_t sum = {{vdupq_n_s32(start), vdupq_n_s32(start)}};
  for (int p = 0; p < 4; ++p) {
    const int16x8x2_t entries = vld2q_s16(codebook.pairs() + (p * codebook.entries + k) * 2);
    DROP_UNROLL
    for (int i = 0; i < 2; ++i) {
      sum.val[0] = vmlal_n_s16(sum.val[0], vget_low_s16(entries.val[i]), x[2 * p + i]);
      sum.val[1] = vmlal_n_s16(sum.val[1], vget_high_s16(entries.val[i]), x[2 * p + i]);
    }
  }
  return sum;
}

template <int kDigits>
struct Lookup {
  static constexpr int kBits = kDigits == 2 ? kBits16 : kBits8;
  static constexpr int64_t kGroupBytes[2] = {kHalf * kDigits, kEntries * kDigits};

  static int32_t group_max(const int16_t* x, const Codebook& codebook) {
    int32x4_t most = vdupq_n_s32(0);
    for (int k = 0; k < codebook.entries; k += 8) {
      const int32x4x2_t sum = dots(x, codebook, k, 0);
      most = vmaxq_s32(most, vmaxq_s32(vabsq_s32(sum.val[0]), vabsq_s32(sum.val[1])));
    }
    return vmaxvq_s32(most);
  }

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    for (int k = 0; k < codebook.entries; k += 8) {
      const int32x4x2_t sum = dots(x, codebook, k, 1 << 30);
      const uint16x8_t words =
          vcombine_u16(vmovn_u32(vshrq_n_u32(vreinterpretq_u32_s32(sum.val[0]), 31 - kBits)),
                       vmovn_u32(vshrq_n_u32(vreinterpretq_u32_s32(sum.val[1]), 31 - kBits)));
      if (kDigits == 1) {
        vst1_u8(out + k, vmovn_u16(words));
      } else {
        vst1_u8(out + k, vmovn_u16(vandq_u16(words, vdupq_n_u16(127))));
        vst1_u8(out + codebook.entries + k, vmovn_u16(vshrq_n_u16(words, 7)));
      }
    }
  }

  template <bool kSymmetric, int kStrips>
  static void tile(const Tile& tile) {
    for (int s = 0; s < kStrips; ++s) strip<kSymmetric>(tile.part(s, 1, kStrips));
  }

  // One strip is four registers.
  template <bool kSymmetric>
  static void strip(const Tile& tile) {
    constexpr int64_t kLut = kGroupBytes[kSymmetric ? 0 : 1];
    constexpr int64_t kApart = kLut / kDigits;
    const uint8x16_t top = vdupq_n_u8(kDigits == 2 ? 127 : 255);
    const uint8_t* codes = tile.codes;
    const uint8_t* lut = tile.lut;
    Sums totals[4][kDigits];
    DROP_UNROLL
    for (int q = 0; q < 4; ++q) {
      DROP_UNROLL
      for (int d = 0; d < kDigits; ++d) totals[q][d] = Sums::zero();
    }
    for (int64_t j = 0; j < tile.count; ++j, codes += kStrip, lut += kLut) {
      __builtin_prefetch(ahead<kAhead>(tile, j));
      DROP_UNROLL
      for (int d = 0; d < kDigits; ++d) {
        DROP_UNROLL
        for (int q = 0; q < 4; ++q) {
          totals[q][d].add(look_up<kSymmetric>(lut + d * kApart, vld1q_u8(codes + 16 * q), top));
        }
      }
    }
    const int32_t offset = static_cast<int32_t>(tile.count) * ((1 << kBits) - 1);
    DROP_UNROLL
    for (int q = 0; q < 4; ++q) {
      DROP_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        uint32x4_t first = vdupq_n_u32(0), second = first;
        DROP_UNROLL
        for (int d = kDigits - 1; d >= 0; --d) {
          const uint16x8_t lanes = odd ? totals[q][d].odd : totals[q][d].even();
          first = vaddw_u16(vshlq_n_u32(first, 7), vget_low_u16(lanes));
          second = vaddw_u16(vshlq_n_u32(second, 7), vget_high_u16(lanes));
        }
        float* out = tile.sums + 8 * q + 32 * odd;
        add_scaled(out, first, offset, tile.half_step);
        add_scaled(out + 4, second, offset, tile.half_step);
      }
    }
  }
};

typedef Nibbles<Bytes16> Planes;

extern const Kernel kernel;
extern const Kernel u8_kernel;
constexpr Kernel kernel = make_kernel<Tiled<Lookup<2>>, Planes>("neon", "NEON, 14-bit tables");
constexpr Kernel u8_kernel = make_kernel<Tiled<Lookup<1>>, Planes>("neon-u8", "NEON, 8-bit tables");

}  // namespace DROP_ISA
}  // namespace drop
