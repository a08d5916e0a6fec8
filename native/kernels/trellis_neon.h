// Trellis planes with NEON: 16 inputs a register; TBL looks labels up by half bytes, and values in
// all 64 at once. Products by SDOT where the compiler may use it.
#pragma once

#include "trellis_nibbles.h"

namespace drop {
namespace DROP_ISA {

struct Bytes16 {
  typedef uint8x16_t Vec;
  typedef int32x4_t Acc;
  static constexpr int64_t kWidth = 16;
  static constexpr int kOffset = 0;
  static constexpr int64_t kRows = 1;

  DROP_INLINE Vec load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  DROP_INLINE void store(uint8_t* p, Vec v) { vst1q_u8(p, v); }
  DROP_INLINE void pin(Vec& v) { asm("" : "+w"(v)); }
  DROP_INLINE Vec low(Vec v) { return vandq_u8(v, vdupq_n_u8(15)); }
  DROP_INLINE Vec high(Vec v) { return vshrq_n_u8(v, 4); }
  DROP_INLINE Vec bit_xor(Vec a, Vec b) { return veorq_u8(a, b); }
  DROP_INLINE Vec shuffle(const uint8_t* table, Vec index) {
    return vqtbl1q_u8(vld1q_u8(table), index);
  }
  DROP_INLINE Vec values(const Trellis& book, Vec label) {
    return vqtbl4q_u8(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(book.values)), label);
  }
  DROP_INLINE Acc zero() { return vdupq_n_s32(0); }
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
    const int8x16_t v = vreinterpretq_s8_u8(value), y = vreinterpretq_s8_u8(x);
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, v, y);
#else  // sums of two products fit 16 bits: 2 * 63 * 128 < 2^15
    const int16x8_t pairs = vmull_s8(vget_low_s8(v), vget_low_s8(y));
    return vpadalq_s16(sum, vmlal_high_s8(pairs, v, y));
#endif
  }
  DROP_INLINE void sum_lanes(const Acc* sums, int32_t* low, int32_t* high) {
    const int32x4_t a = vpaddq_s32(sums[0], sums[1]), b = vpaddq_s32(sums[2], sums[3]);
    const int32x4_t c = vpaddq_s32(sums[4], sums[5]), d = vpaddq_s32(sums[6], sums[7]);
    vst1q_s32(low, vpaddq_s32(a, b));
    vst1q_s32(high, vpaddq_s32(c, d));
  }
};

}  // namespace DROP_ISA
}  // namespace drop
