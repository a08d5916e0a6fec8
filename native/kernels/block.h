// What a transformer block does between its products, for decoding a few tokens: RMS norm, rotary
// positions, attention over a cache, SiLU of the feed-forward gate. Plain loops over vectors of
// 8 floats; in float32 throughout.
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

typedef float Lane8 __attribute__((vector_size(32)));

DROP_INLINE Lane8 load8(const float* p) {
  Lane8 v;
  memcpy(&v, p, 32);
  return v;
}

DROP_INLINE float sum8(Lane8 v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

// out = x / sqrt(mean x^2 + eps) * weight. d is a multiple of 8; out may be x.
static void norm(const float* x, const float* weight, int64_t d, float eps, float* out) {
  Lane8 sums = {};
  for (int64_t i = 0; i < d; i += 8) sums += load8(x + i) * load8(x + i);
  const float scale = 1.0f / sqrtf(sum8(sums) / static_cast<float>(d) + eps);
  for (int64_t i = 0; i < d; ++i) out[i] = weight[i] * (x[i] * scale);
}

// Rotary position of one head, halves convention: cosine and sine [d], first and second half alike.
static void apply_rope(const float* cosine, const float* sine, int64_t d, float* x) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

// e^x to two units in the last place; below -87 it is e^-87. (Cephes expf, without branches.)
DROP_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits, power;
  memcpy(&bits, &p, 4);
  memcpy(&power, &shifted, 4);
  bits += (power - 0x4b400000u) << 23;
  memcpy(&p, &bits, 4);
  return p;
}

// out = silu(gates) * ups
static void silu_mul(const float* gates, const float* ups, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = gates[i] / (1.0f + exponential(-gates[i])) * ups[i];
  }
}

template <Scalar kType>
DROP_INLINE Lane8 load_cache(const void* base, int64_t index) {
  if (kType == kF32) return load8(static_cast<const float*>(base) + index);
  float lanes[8];
  load_scalars(base, kType, index, 8, lanes);
  return load8(lanes);
}

// One head and one token: softmax(scale * q K^T) V over `length` cached positions. kVectors is
// d / 8, or 0 if only known at run time.
template <Scalar kType, int kVectors>
static void attention_of(const AttentionJob& job) {
  const int64_t vectors = kVectors ? kVectors : job.d / 8;
  Lane8 query[32], sums[32];  // d is at most 256
  for (int64_t v = 0; v < vectors; ++v) {
    query[v] = load8(job.query + v * 8) * job.scale;
    sums[v] = Lane8{};
  }
  float most = -INFINITY;
  for (int64_t t = 0; t < job.length; ++t) {
    Lane8 products = {};
    for (int64_t v = 0; v < vectors; ++v) {
      products += query[v] * load_cache<kType>(job.keys, t * job.d + v * 8);
    }
    job.scores[t] = sum8(products);
    most = job.scores[t] > most ? job.scores[t] : most;
  }
  for (int64_t t = 0; t < job.length; ++t) job.scores[t] = exponential(job.scores[t] - most);
  float total = 0;
  for (int64_t t = 0; t < job.length; ++t) {
    const float weight = job.scores[t];
    total += weight;
    for (int64_t v = 0; v < vectors; ++v) {
      sums[v] += load_cache<kType>(job.values, t * job.d + v * 8) * weight;
    }
  }
  const float norm = 1.0f / total;
  for (int64_t v = 0; v < vectors; ++v) {
    const Lane8 mean = sums[v] * norm;
    memcpy(job.out + v * 8, &mean, 32);
  }
}

template <Scalar kType>
static void attention_as(const AttentionJob& job) {
  switch (job.d) {
    case 64: return attention_of<kType, 8>(job);
    case 128: return attention_of<kType, 16>(job);
    default: return attention_of<kType, 0>(job);
  }
}

static void attention(const AttentionJob& job) {
  switch (job.cache_type) {
    case kF16: return attention_as<kF16>(job);
    case kBF16: return attention_as<kBF16>(job);
    default: return attention_as<kF32>(job);
  }
}

// float32 [count] -> cache entries of that type.
static void store(const float* x, int64_t count, Scalar type, void* out, int64_t index) {
  for (int64_t i = 0; i < count; ++i) {
    if (type == kF32) {
      store_scalar<kF32>(out, index + i, x[i]);
    } else if (type == kF16) {
      store_scalar<kF16>(out, index + i, x[i]);
    } else {
      store_scalar<kBF16>(out, index + i, x[i]);
    }
  }
}

}  // namespace DROP_ISA
}  // namespace drop
