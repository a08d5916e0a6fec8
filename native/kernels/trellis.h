// Trellis planes: what is prepared of a codebook, how a plane lies in memory, and the formula that
// every instruction set computes.
//
// Held layout: uint8 [byte rows, stride], as a checkpoint stores it, each row padded to a multiple
// of 64 inputs (kLine) with anything. A column is the bit stream of one input, k bits a weight, so
// a line of 64 bytes holds the same 8 / k rows of 64 inputs. The window of a row ends with its own
// bits and spans at most three bytes: the one of the row and the two before it. The stream is a
// ring: before byte row 0 comes the last one.
//
// Four rows, a quad, have their newest bits in one byte: a whole one when k = 2, half of one when
// k = 1. The label of a row is linear in the window over GF(2), so it is the XOR of one linear map
// of each byte: GF2P8AFFINEQB does one for 64 inputs, a processor without it looks up half a byte
// at a time in 16 labels. A look-up in 64 bytes makes the label a value.
//
// The formula. An input row x is rounded to integers X with one step, |X| <= kInputMax = 127 * 256
// + 127, and split into two signed bytes, X = 256 * high + low. With values v of plane m,
//
//     S_m = sum over inputs j of v_m[r, j] * X[j]      exact, in integers
//     t = 0; for m = 0, 1, ..: t = t + float(S_m) * scale_m
//     y = (t * step) * row_scale (+ bias) (+ residual)
//
// in float32, each operation rounded (no fused multiply-add), integers rounded to float once. So
// all kernels, numbers of threads and of input rows give the same bits. Decoding is the reference's
// (codebook_set.py): w = row_scale * sum over m of v_m * scale_m, each operation rounded.
//
// Sums of 32 bits suffice for each byte of X: 127 * 128 * kTrellisInputs < 2^31, where 127 is the
// largest value after an offset of 64 that some kernels need for unsigned products.
#pragma once

#include "geometry.h"

namespace drop {

constexpr int64_t kLine = 64;                   // inputs of a line
constexpr int64_t kQuad = 4;                    // rows
constexpr int64_t kTile = 8;                    // rows whose quads are computed together
constexpr int64_t kTrellisInputs = 1 << 17;     // most inputs of a product, padding included
constexpr int kLabels = 64;                     // values of a plane
constexpr int kValueMax = 63;                   // of |value|
constexpr int kInputMax = 127 * 256 + 127;      // of |X|: both bytes are signed
constexpr int kMinWindow = 8, kMaxWindow = 17;  // three bytes hold every window of these
constexpr int kSpan = 3;                        // bytes that a window spans
constexpr int kNibbles = 5;                     // half bytes that a window spans at most

// How a quad's labels depend on the byte of its newest bits (lag 0) and the two before.
struct TrellisQuad {
  uint64_t matrix[kSpan][kQuad];  // by lag, as GF2P8AFFINEQB takes them
  alignas(
      16) uint8_t labels[kQuad][kNibbles][16];  // by half byte, from the newest one of the row back
};

// A prepared codebook of a trellis plane. 64-byte aligned.
struct alignas(64) Trellis {
  int8_t values[kLabels];
  uint8_t raised[kLabels];           // values + 64
  alignas(16) uint8_t steps[4][16];  // row 0 of `raised`, then each row XOR the one before
  TrellisQuad quads[2];  // newest bits in the low and in the high half of a byte; equal, k = 2
  float scale;           // w = value * scale
  int32_t bits, window;  // k, L
  int32_t oldest;        // rows of quads[0], quads[1] whose window reaches lag 2: the first of
  int32_t oldest_high;   // each
  int32_t nibbles;       // half bytes that each row's window spans, the most of all rows

  int64_t byte_row(int64_t quad) const { return bits == 2 ? quad : quad / 2; }
};

static inline int64_t trellis_stride(int64_t d_in) { return round_up(d_in, kLine); }

// Byte rows of a plane: a ring is never shorter than a window.
static inline int64_t stream_bytes(int64_t d_out, int64_t bits) {
  const int64_t bytes = (d_out * bits + 7) / 8;
  return bytes < kSpan ? kSpan : bytes;
}

// Tiles of `bits` bits a weight between the one that is computed and the one that is fetched: 8 KB
// at least, as the next one alone is often too near.
static inline int64_t tiles_ahead(int64_t bits, int64_t stride) {
  return 1 + 8192 / (bits * stride);
}

// The integers of n rows of x.
struct TrellisInputs {
  int8_t* bytes;  // [n, 2, stride]: low, high; padding 0
  int64_t* sums;  // [n], of X
  float* steps;   // [n]: x = X * step
  int64_t n, stride;

  static int64_t size(int64_t n, int64_t d_in) {
    return round_up(n * (2 * trellis_stride(d_in) + 16), 64);
  }
  static TrellisInputs in(uint8_t* memory, int64_t n, int64_t d_in) {
    const int64_t stride = trellis_stride(d_in);
    int64_t* sums = reinterpret_cast<int64_t*>(memory + n * 2 * stride);
    return {reinterpret_cast<int8_t*>(memory), sums, reinterpret_cast<float*>(sums + n), n, stride};
  }
  int8_t* low(int64_t row) const { return bytes + 2 * row * stride; }
  int8_t* high(int64_t row) const { return low(row) + stride; }
};

}  // namespace drop
