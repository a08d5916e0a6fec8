// Decoding codes to a dense matrix: the sum of P entries in float32 in plane order, then one
// product with the row scale. The operations of the reference (code.py), so the results agree bit
// for bit.
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));
typedef uint16_t Uint8x16 __attribute__((vector_size(16)));

template <int P>  // 0: any prefix
DROP_INLINE void decode_span(const uint8_t* const* codes, int64_t stride, int64_t count,
                             const float* const* entries, int64_t prefix, float scale, void* out,
                             Scalar type) {
  const int64_t planes = P ? P : prefix;
  for (int64_t j = 0; j < count; ++j) {
    Float8 total, entry;
    memcpy(&total, entries[0] + codes[0][j * stride] * kGroup, 32);
    for (int64_t m = 1; m < planes; ++m) {
      memcpy(&entry, entries[m] + codes[m][j * stride] * kGroup, 32);
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
  const uint8_t* codes[kMaxPlanes];
  const float* entries[kMaxPlanes];
  const int64_t planes = P ? P : job.prefix;
  for (int64_t m = 0; m < planes; ++m) entries[m] = job.codebooks[m]->values();
  for (int64_t start = first; start < last;) {
    const int64_t strip = start / kStrip;
    const int64_t stop = (strip + 1) * kStrip < last ? (strip + 1) * kStrip : last;
    for (int64_t block = 0; block < job.plane.blocks(); ++block) {
      const int64_t count = job.plane.block_groups(block);
      for (int64_t row = start; row < stop; ++row) {
        const int64_t offset = job.packed ? job.plane.offset(block, strip) + row_byte(row % kStrip)
                                          : row * job.plane.groups + block * kBlock;
        for (int64_t m = 0; m < planes; ++m) codes[m] = job.planes[m] + offset;
        const float scale = load_scalar(job.scales, job.scale_type, row);
        void* out = static_cast<char*>(job.out) +
                    ((row - job.first_row) * job.out_stride + block * kBlock * kGroup) * size;
        // The type is a constant in each branch, so that the inner loop has none.
        if (job.out_type == kF32) {
          decode_span<P>(codes, stride, count, entries, planes, scale, out, kF32);
        } else {
          decode_span<P>(codes, stride, count, entries, planes, scale, out, kBF16);
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

}  // namespace DROP_ISA
}  // namespace drop
