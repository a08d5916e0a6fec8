// Products with eight-bit rows (an output head): int8 weights, activations rounded to int16 with
// one step a row, integer sums. A read of the rows at memory speed; error about 3e-5.
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

constexpr int64_t kRowChunk = 512;  // products that are summed in int32: 127 * 32767 * 512 < 2^31

// How far ahead to prefetch: bandwidth times latency, and half as much again.
constexpr int64_t kAheadBytes = 8192;

static float quantize_row(const void* x, Scalar type, int64_t d_in, int16_t* out) {
  float values[kRowChunk];
  uint32_t bits = 0;
  for (int64_t i = 0; i < d_in; ++i) {
    const float value = load_scalar(x, type, i);
    uint32_t here;
    memcpy(&here, &value, 4);
    here &= 0x7fffffff;
    bits = here > bits ? here : bits;
  }
  float largest;
  memcpy(&largest, &bits, 4);
  if (bits >= 0x7f800000) {  // infinity or NaN: every product is NaN
    memset(out, 0, static_cast<size_t>(d_in) * 2);
    bits = 0x7fc00000;
    memcpy(&largest, &bits, 4);
    return largest;
  }
  const float factor = largest < 1e-25f ? 0 : 32767.0f / largest;
  for (int64_t start = 0; start < d_in; start += kRowChunk) {
    const int64_t count = d_in - start < kRowChunk ? d_in - start : kRowChunk;
    for (int64_t i = 0; i < count; ++i) values[i] = load_scalar(x, type, start + i);
    quantize(values, count, factor, out + start);
  }
  return factor == 0 ? 0 : 1 / factor;
}

#ifdef __AVX2__
// The sum of 32-bit lanes, exact: with short rows it would otherwise take longer than the products.
#ifdef __AVX512BW__
DROP_INLINE int64_t sum_lanes(__m512i lanes) {
  return _mm512_reduce_add_epi64(
      _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)),
                       _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1))));
}
#else
DROP_INLINE int64_t sum_lanes(__m256i lanes) {
  const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1)));
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
}
#endif

// The whole vectors of `dot_rows`; returns how many products were summed.
DROP_INLINE int64_t dot_rows_x86(const int8_t* const* rows, const int16_t* x, int64_t d_in,
                                 int64_t ahead, int64_t* sums) {
#ifdef __AVX512BW__
  constexpr int64_t kStep = 32;
  typedef __m512i Lanes;
  const auto load_x = [](const int16_t* p) { return _mm512_loadu_si512(p); };
  const auto load_w = [](const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
#ifdef __AVX512VNNI__
  const auto add = [](Lanes a, Lanes w, Lanes v) { return _mm512_dpwssd_epi32(a, w, v); };
#else
  const auto add = [](Lanes a, Lanes w, Lanes v) {
    return _mm512_add_epi32(a, _mm512_madd_epi16(w, v));
  };
#endif
#else
  constexpr int64_t kStep = 16;
  typedef __m256i Lanes;
  const auto load_x = [](const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  const auto load_w = [](const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  const auto add = [](Lanes a, Lanes w, Lanes v) {
    return _mm256_add_epi32(a, _mm256_madd_epi16(w, v));
  };
#endif
  constexpr int64_t kMost = kRowChunk * kStep / 2;  // a lane takes 2 of kStep products
  int64_t k = 0;
  while (k + kStep <= d_in) {
    const int64_t stop = k + kMost < d_in ? k + kMost : d_in;
    Lanes lanes[4] = {};
    for (; k + kStep <= stop; k += kStep) {
      const Lanes v = load_x(x + k);
      DROP_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (k % 64 == 0) {  // once a line
          _mm_prefetch(reinterpret_cast<const char*>(rows[r] + k + ahead), _MM_HINT_T0);
        }
        lanes[r] = add(lanes[r], load_w(rows[r] + k), v);
      }
    }
    DROP_UNROLL
    for (int r = 0; r < 4; ++r) sums[r] += sum_lanes(lanes[r]);
  }
  return k;
}
#endif

// Sums of products of four rows of int8 with x, exact.
DROP_INLINE void dot_rows(const int8_t* const* rows, const int16_t* x, int64_t d_in,
                          [[maybe_unused]] int64_t ahead, int64_t* sums) {
  int64_t k = 0;
  for (int r = 0; r < 4; ++r) sums[r] = 0;
#ifdef __AVX2__
  k = dot_rows_x86(rows, x, d_in, ahead, sums);
#endif
  for (; k < d_in;) {
    const int64_t stop = k + kRowChunk < d_in ? k + kRowChunk : d_in;
    int32_t part[4] = {};
    for (; k < stop; ++k) {
      for (int r = 0; r < 4; ++r) part[r] += rows[r][k] * x[k];
    }
    for (int r = 0; r < 4; ++r) sums[r] += part[r];
  }
}

template <Scalar kType>
static void int8_rows_of(const Int8RowsJob& job, int64_t first, int64_t last) {
  constexpr int64_t kChunk = 64;
  float scales[kChunk];
  // Four rows are read side by side: what comes next is the same place of four rows further on.
  const int64_t ahead = round_up(kAheadBytes, 4 * job.d_in);
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t stop = start + kChunk < last ? start + kChunk : last;
    load_scalars(job.scales, job.scale_type, start, stop - start, scales);
    for (int64_t row = start; row < stop; row += 4) {
      const int64_t count = stop - row < 4 ? stop - row : 4;
      const int8_t* four[4];
      for (int64_t r = 0; r < 4; ++r) four[r] = job.rows + (row + (r < count ? r : 0)) * job.d_in;
      for (int64_t i = 0; i < job.n; ++i) {
        int64_t sums[4];
        dot_rows(four, job.x + i * job.d_in, job.d_in, ahead, sums);
        for (int64_t r = 0; r < count; ++r) {
          const float scale = scales[row + r - start] * job.x_step[i];
          store_scalar<kType>(job.out, i * job.out_stride + row + r,
                              static_cast<float>(sums[r]) * scale);
        }
      }
    }
  }
}

static void int8_rows(const Int8RowsJob& job, int64_t first, int64_t last) {
  switch (job.out_type) {
    case kF16: return int8_rows_of<kF16>(job, first, last);
    case kBF16: return int8_rows_of<kBF16>(job, first, last);
    default: return int8_rows_of<kF32>(job, first, last);
  }
}

}  // namespace DROP_ISA
}  // namespace drop
