// Trellis planes in plain C++: registers of one byte.
#pragma once

#include "trellis_nibbles.h"

namespace drop {
namespace DROP_ISA {

struct OneByte {
  typedef uint8_t Vec;
  typedef int32_t Acc;
  static constexpr int64_t kWidth = 1;
  static constexpr int kOffset = 0;
  static constexpr int64_t kRows = 1;

  DROP_INLINE Vec load(const void* p) { return *static_cast<const uint8_t*>(p); }
  DROP_INLINE void store(uint8_t* p, Vec v) { *p = v; }
  DROP_INLINE void pin(Vec& v) { asm("" : "+r"(v)); }
  DROP_INLINE Vec low(Vec v) { return v & 15; }
  DROP_INLINE Vec high(Vec v) { return v >> 4; }
  DROP_INLINE Vec bit_xor(Vec a, Vec b) { return a ^ b; }
  DROP_INLINE Vec shuffle(const uint8_t* table, Vec index) { return table[index]; }
  DROP_INLINE Vec values(const Trellis& book, Vec label) {
    return static_cast<uint8_t>(book.values[label]);
  }
  DROP_INLINE Acc zero() { return 0; }
  DROP_INLINE Acc dot(Acc sum, Vec value, Vec x) {
    return sum + static_cast<int8_t>(value) * static_cast<int8_t>(x);
  }
  DROP_INLINE void sum_lanes(const Acc* sums, int32_t* low, int32_t* high) {
    for (int i = 0; i < kQuad; ++i) {
      low[i] = sums[i];
      high[i] = sums[kQuad + i];
    }
  }
};

}  // namespace DROP_ISA
}  // namespace drop
