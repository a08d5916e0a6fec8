// The plain parts of a kernel, written as loops that a compiler vectorizes: decoding codes to a
// dense matrix, rotating an activation row, converting scalars. Included once per instruction set,
// inside a namespace of its own (DROP_ISA): the same inline function compiled with different flags
// must never be merged by the linker. For that reason no standard template is used here.
//
// Decoding: sum of P entries in float32 in plane order, then one product with the row scale, the
// same operations as the reference (code.py), so results agree bit for bit.
//
// Rotating: sign and normalise, Walsh-Hadamard butterflies (two stages a pass), then the odd
// factor. No contraction to fused multiply-add (compiled with -ffp-contract=off), so every
// instruction set computes the same bits.
#pragma once

#include <cmath>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernel.h"

#ifndef DROP_ISA
#error "define DROP_ISA before including dense.h"
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
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

typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));
typedef uint16_t Uint8x16 __attribute__((vector_size(16)));

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

// ---- decode ------------------------------------------------------------------------------------

template <int P>  // 0: any prefix
DROP_INLINE void decode_span(const uint8_t* const* codes, int64_t stride, int64_t count,
                             const float* const* tables, int64_t prefix, float scale, void* out,
                             Scalar type) {
  const int64_t planes = P ? P : prefix;
  for (int64_t j = 0; j < count; ++j) {
    Float8 total, entry;
    memcpy(&total, tables[0] + codes[0][j * stride] * kGroup, 32);
    for (int64_t m = 1; m < planes; ++m) {
      memcpy(&entry, tables[m] + codes[m][j * stride] * kGroup, 32);
      total += entry;
    }
    total *= scale;
    if (type == kF32) {
      memcpy(static_cast<float*>(out) + j * kGroup, &total, 32);
    } else {  // bfloat16, nearest even
      Uint8x32 bits;
      memcpy(&bits, &total, 32);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      const Uint8x16 rounded = __builtin_convertvector(bits, Uint8x16);
      memcpy(static_cast<uint16_t*>(out) + j * kGroup, &rounded, 16);
    }
  }
}

// Rows of one strip together, block by block: their codes lie in the same cache lines.
template <int P>
static void decode_rows(const DecodeJob& job, int64_t first, int64_t last) {
  const int64_t size = job.out_type == kF32 ? 4 : 2;
  const int64_t stride = job.packed ? kStrip : 1;
  const uint8_t* codes[kMostPlanes];
  const float* tables[kMostPlanes];
  const int64_t planes = P ? P : job.prefix;
  for (int64_t m = 0; m < planes; ++m) tables[m] = job.codebooks[m]->values();
  for (int64_t start = first; start < last;) {
    const int64_t strip = start / kStrip;
    const int64_t stop = (strip + 1) * kStrip < last ? (strip + 1) * kStrip : last;
    for (int64_t block = 0; block < job.plane.blocks(); ++block) {
      const int64_t count = job.plane.block_groups(block);
      for (int64_t row = start; row < stop; ++row) {
        const int64_t offset = job.packed
                                   ? job.plane.offset(block, strip) + row_byte(row % kStrip)
                                   : row * job.plane.groups + block * kBlock;
        for (int64_t m = 0; m < planes; ++m) codes[m] = job.planes[m] + offset;
        const float scale = load_scalar(job.scales, job.scale_type, row);
        void* out = static_cast<char*>(job.out) +
                    ((row - job.first_row) * job.out_stride + block * kBlock * kGroup) * size;
        // The type is a constant in each branch, so that the inner loop has none.
        if (job.out_type == kF32) {
          decode_span<P>(codes, stride, count, tables, planes, scale, out, kF32);
        } else {
          decode_span<P>(codes, stride, count, tables, planes, scale, out, kBF16);
        }
      }
    }
    start = stop;
  }
}

static void decode(const DecodeJob& job, int64_t first, int64_t last) {
  switch (job.prefix) {
    case 1: return decode_rows<1>(job, first, last);
    case 2: return decode_rows<2>(job, first, last);
    case 3: return decode_rows<3>(job, first, last);
    case 4: return decode_rows<4>(job, first, last);
    default: return decode_rows<0>(job, first, last);
  }
}

// ---- the yardstick: one plain sequential read ----------------------------------------------------

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

// ---- the end of a product ------------------------------------------------------------------------

template <Scalar kType>
DROP_INLINE void finish_rows(const FinishJob& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    float y = job.sums[i] * load_scalar(job.scales, job.scale_type, i);
    if (job.bias) y += load_scalar(job.bias, job.bias_type, i);
    if (kType == kF32) {
      static_cast<float*>(job.out)[i] = y;
    } else {
      static_cast<uint16_t*>(job.out)[i] = kType == kF16 ? float_to_half(y) : float_to_bf16(y);
    }
  }
}

static void finish(const FinishJob& job, int64_t first, int64_t last) {
  switch (job.out_type) {
    case kF16: return finish_rows<kF16>(job, first, last);
    case kBF16: return finish_rows<kBF16>(job, first, last);
    default: return finish_rows<kF32>(job, first, last);
  }
}

// ---- rotate ------------------------------------------------------------------------------------

// Butterflies at distance h: x, y -> x + y, x - y.
DROP_INLINE void butterfly(float* x, int64_t size, int64_t h) {
  for (int64_t start = 0; start < size; start += 2 * h) {
    float* __restrict low = x + start;
    float* __restrict high = x + start + h;
    for (int64_t i = 0; i < h; ++i) {
      const float a = low[i], b = high[i];
      low[i] = a + b;
      high[i] = a - b;
    }
  }
}

// Two stages, distances h and 2h, in one pass over memory; same sums as `butterfly` twice.
DROP_INLINE void butterfly_twice(float* x, int64_t size, int64_t h) {
  for (int64_t start = 0; start < size; start += 4 * h) {
    float* __restrict p = x + start;
    float* __restrict q = p + h;
    float* __restrict r = p + 2 * h;
    float* __restrict s = p + 3 * h;
    for (int64_t i = 0; i < h; ++i) {
      const float a = p[i] + q[i], b = p[i] - q[i], c = r[i] + s[i], d = r[i] - s[i];
      p[i] = a + c;
      q[i] = b + d;
      r[i] = a - c;
      s[i] = b - d;
    }
  }
}

// Distances 1 and 2, inside a vector.
DROP_INLINE Float4 hadamard4(Float4 v) {
  const Int4 flip1 = {0, INT32_MIN, 0, INT32_MIN}, flip2 = {0, 0, INT32_MIN, INT32_MIN};
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2) + (Float4)((Int4)v ^ flip1);
  return __builtin_shufflevector(v, v, 2, 3, 0, 1) + (Float4)((Int4)v ^ flip2);
}

// Distances 1, 2, 4 and 8.
DROP_INLINE void hadamard16(float* x) {
#ifdef __AVX512F__
  // Multiplying by 1 or -1 is exact: the fused operation gives the bits of an addition.
  const __m512 one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
  __m512 v = _mm512_loadu_ps(x);
  v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xaaaa, one, minus), _mm512_permute_ps(v, 0xb1));
  v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xcccc, one, minus), _mm512_permute_ps(v, 0x4e));
  v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xf0f0, one, minus),
                      _mm512_shuffle_f32x4(v, v, 0xb1));
  v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xff00, one, minus),
                      _mm512_shuffle_f32x4(v, v, 0x4e));
  _mm512_storeu_ps(x, v);
#else
  Float4 v[4];
  memcpy(v, x, 64);
  DROP_UNROLL
  for (int k = 0; k < 4; ++k) v[k] = hadamard4(v[k]);
  const Float4 a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  v[0] = a + c;
  v[1] = b + d;
  v[2] = a - c;
  v[3] = b - d;
  memcpy(x, v, 64);
#endif
}

static void hadamard(float* x, int64_t size) {
  if (size == 2) butterfly(x, 2, 1);
  if (size < 4) return;
  int64_t h = 4;
  if (size < 16) {
    for (int64_t i = 0; i < size; i += 4) {
      Float4 v;
      memcpy(&v, x + i, 16);
      v = hadamard4(v);
      memcpy(x + i, &v, 16);
    }
  } else {
    for (int64_t i = 0; i < size; i += 16) hadamard16(x + i);
    h = 16;
  }
  for (; 4 * h <= size; h *= 4) butterfly_twice(x, size, h);
  if (h < size) butterfly(x, size, h);
}

// out = O v with O [odd, odd], v and out [odd, width].
static void mix_odd(const float* matrix, int64_t odd, int64_t width, const float* v, float* out) {
  constexpr int64_t kChunk = 32;
  int64_t start = 0;
  for (; start + kChunk <= width; start += kChunk) {
    for (int64_t i = 0; i < odd; ++i) {
      float sum[kChunk] = {};
      for (int64_t k = 0; k < odd; ++k) {
        const float weight = matrix[i * odd + k];
        const float* row = v + k * width + start;
        for (int64_t c = 0; c < kChunk; ++c) sum[c] += weight * row[c];
      }
      memcpy(out + i * width + start, sum, sizeof sum);
    }
  }
  for (; start < width; ++start) {
    for (int64_t i = 0; i < odd; ++i) {
      float sum = 0;
      for (int64_t k = 0; k < odd; ++k) sum += matrix[i * odd + k] * v[k * width + start];
      out[i * width + start] = sum;
    }
  }
}

static void rotate(const RotateJob& job, const void* x, Scalar type, float* out, float* scratch) {
  float* target = job.odd ? scratch : out;
  if (type == kF32) {
    memcpy(target, x, static_cast<size_t>(job.d) * 4);
  } else if (type == kF16) {
    for (int64_t i = 0; i < job.d; ++i) target[i] = load_scalar(x, kF16, i);
  } else {
    for (int64_t i = 0; i < job.d; ++i) target[i] = load_scalar(x, kBF16, i);
  }
  if (!job.signs) return;
  const float norm = 1.0f / sqrtf(static_cast<float>(job.block));
  for (int64_t i = 0; i < job.d; ++i) target[i] = target[i] * job.signs[i] * norm;
  for (int64_t start = 0; start < job.d; start += job.block) hadamard(target + start, job.block);
  if (job.odd) mix_odd(job.odd, job.d / job.block, job.block, scratch, out);
}

}  // namespace DROP_ISA
}  // namespace drop
