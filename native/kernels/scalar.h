// Scalars, and what every file of an instruction set starts with.
//
// These headers are included once per instruction set, inside a namespace of its own (DROP_ISA):
// the same inline function compiled with different flags must never be merged by the linker. For
// that reason no standard template is used in them. Loops are written for the compiler to
// vectorize, and compiled without contraction to fused multiply-add (-ffp-contract=off), so that
// every instruction set computes the same bits.
#pragma once

#include <cmath>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "kernel.h"

#ifndef DROP_ISA
#error "define DROP_ISA before including scalar.h"
#endif
#define DROP_INLINE static inline __attribute__((always_inline))
// On every loop over an array of accumulators: one loop left rolled puts them all in memory.
#if defined(__clang__)
#define DROP_UNROLL _Pragma("unroll")
#else
#define DROP_UNROLL _Pragma("GCC unroll 8")
#endif

namespace drop {
namespace DROP_ISA {

DROP_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t body = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t bits = body | sign;
  float value = 0;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: exact, and right for subnormals
  if ((h & 0x7c00) == 0x7c00) {    // infinity and NaN
    bits |= 0x7f800000;
    memcpy(&value, &bits, 4);
  }
  return value;
}

DROP_INLINE float load_scalar(const void* base, Scalar type, int64_t index) {
  if (type == kF32) return static_cast<const float*>(base)[index];
  const uint16_t raw = static_cast<const uint16_t*>(base)[index];
  if (type == kF16) return half_to_float(raw);
  const uint32_t bits = static_cast<uint32_t>(raw) << 16;
  float value = 0;
  memcpy(&value, &bits, 4);
  return value;
}

DROP_INLINE uint16_t float_to_bf16(float value) {  // nearest even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DROP_INLINE uint16_t float_to_half(float value) {  // nearest even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  if (bits < 0x38800000) {  // below 2^-14: let an addition do the rounding
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
}

// Scalars of any type as float32.
DROP_INLINE void load_scalars(const void* base, Scalar type, int64_t first, int64_t count,
                              float* out) {
  int64_t i = 0;
  if (type == kF32) {
    memcpy(out, static_cast<const float*>(base) + first, static_cast<size_t>(count) * 4);
  } else if (type == kBF16) {
    for (; i < count; ++i) out[i] = load_scalar(base, kBF16, first + i);
  } else {
#ifdef __F16C__
    const uint16_t* raw = static_cast<const uint16_t*>(base) + first;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
    }
#endif
    for (; i < count; ++i) out[i] = load_scalar(base, kF16, first + i);
  }
}

template <Scalar kType>
DROP_INLINE void store_scalar(void* base, int64_t index, float value) {
  if (kType == kF32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<uint16_t*>(base)[index] =
        kType == kF16 ? float_to_half(value) : float_to_bf16(value);
  }
}

// Nearest even, for |x * factor| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
DROP_INLINE void quantize(const float* x, int64_t count, float factor, int16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * factor + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    out[i] = static_cast<int16_t>(bits - 0x4b400000);
  }
}

// The end of a product: scales, bias, type.
template <Scalar kType>
DROP_INLINE void epilogue_rows(const EpilogueJob& job, int64_t first, int64_t last) {
  constexpr int64_t kChunk = 64;
  float y[kChunk], other[kChunk];
  for (; first < last; first += kChunk) {
    const int64_t count = last - first < kChunk ? last - first : kChunk;
    load_scalars(job.scales, job.scale_type, first, count, other);
    for (int64_t i = 0; i < count; ++i) y[i] = job.sums[first + i] * other[i];
    if (job.bias) {
      load_scalars(job.bias, job.bias_type, first, count, other);
      for (int64_t i = 0; i < count; ++i) y[i] += other[i];
    }
    if (job.residual) {
      for (int64_t i = 0; i < count; ++i) y[i] += job.residual[first + i];
    }
    for (int64_t i = 0; i < count; ++i) store_scalar<kType>(job.out, first + i, y[i]);
  }
}

static void epilogue(const EpilogueJob& job, int64_t first, int64_t last) {
  switch (job.out_type) {
    case kF16: return epilogue_rows<kF16>(job, first, last);
    case kBF16: return epilogue_rows<kBF16>(job, first, last);
    default: return epilogue_rows<kF32>(job, first, last);
  }
}

// The yardstick of the benchmarks: one plain sequential read.
static uint64_t stream(const uint8_t* data, int64_t bytes) {
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  Lanes sums[4] = {}, here;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int k = 0; k < 4; ++k) {
      memcpy(&here, data + i + k * 64, 64);
      sums[k] += here;
    }
  }
  const Lanes all = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += all[i];
  return total;
}

}  // namespace DROP_ISA
}  // namespace drop
