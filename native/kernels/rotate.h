// Rotating an activation row: signs and norm, Walsh-Hadamard butterflies (two stages a pass over
// memory, four inside a vector), then the odd factor (rotation.py).
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

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
    memcpy(target, x, static_cast<size_t>(job.d_in) * 4);
  } else if (type == kF16) {
    for (int64_t i = 0; i < job.d_in; ++i) target[i] = load_scalar(x, kF16, i);
  } else {
    for (int64_t i = 0; i < job.d_in; ++i) target[i] = load_scalar(x, kBF16, i);
  }
  if (!job.signs) return;
  const float norm = 1.0f / sqrtf(static_cast<float>(job.block));
  for (int64_t i = 0; i < job.d_in; ++i) target[i] = target[i] * job.signs[i] * norm;
  for (int64_t start = 0; start < job.d_in; start += job.block) hadamard(target + start, job.block);
  if (job.odd) mix_odd(job.odd, job.d_in / job.block, job.block, scratch, out);
}

}  // namespace DROP_ISA
}  // namespace drop
