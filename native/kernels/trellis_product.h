// Products with trellis planes and their decoding (trellis.h): what is the same for every
// instruction set. Included once per instruction set, inside its own namespace.
//
// A tile is 8 rows, two quads; of each quad, plane after plane. With one row of x the values go
// from their registers into the products; with more they are written to a few kilobytes of scratch
// memory and multiplied with every row, so that a label is computed once. A plane's bytes are read
// twice or more within a tile, from the first cache.
//
// An instruction set (`Isa`) supplies
//   Vec, Acc, kWidth       a register of bytes; of sums; inputs in a register
//   kOffset                what its values are raised by: 64 for unsigned bytes, else 0
//   load, store, zero, dot of registers; `add_sums` of eight Acc (four rows with low, then with
//                          high bytes of x) to low[4] and high[4]
//   walk                   calls sink(j, values[4]) for the inputs j of a quad, kWidth at a time
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

// Prefetching. Byte rows of a tile lie `stride` apart, each a stream too short for the hardware to
// follow; so the lines of all byte rows of a later tile are fetched side by side, evenly spread.
constexpr int64_t kTrellisAhead = 8192;  // bytes, at least; the next tile alone is often too near

struct TrellisAhead {
  const uint8_t* rows[2 * kMaxPlanes];
  int64_t count, column;
  int wait, every;

  // For the lines of the first tile of which `tile` is being computed; tiles end at `last`.
  void start(const TrellisGemvJob& job, int64_t tile, int64_t last) {
    int64_t bits = 0;
    for (int64_t m = 0; m < job.prefix; ++m) bits += job.books[m]->bits;
    const int64_t later = tile + 1 + kTrellisAhead / (bits * job.x.stride);
    column = count = wait = 0;
    every = static_cast<int>(2 * job.prefix);
    if (later >= last) return;
    for (int64_t m = 0; m < job.prefix; ++m) {
      const int64_t k = job.books[m]->bits, end = stream_bytes(job.d_out, k);
      for (int64_t row = later * k; row < (later + 1) * k && row < end; ++row) {
        rows[count++] = job.planes[m] + row * job.x.stride;
      }
    }
  }
  // Once a line of a quad and plane.
  inline __attribute__((always_inline)) void step() {
    if (--wait >= 0) return;
    wait = every - 1;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(rows[i] + column);
    column += kLine;
  }
};

// One plane of a quad: its codebook, and the byte rows that its windows see, newest first.
struct QuadBytes {
  const Trellis* book;
  int half;  // which quad of the byte
  const uint8_t* rows[kSpan];

  QuadBytes(const Trellis& from, const uint8_t* plane, int64_t quad, int64_t d_out, int64_t stride)
      : book(&from), half(static_cast<int>(quad % 2)) {
    const int64_t newest = from.byte_row(quad), count = stream_bytes(d_out, from.bits);
    for (int64_t lag = 0; lag < kSpan; ++lag) {
      rows[lag] = plane + (newest - lag + (newest < lag ? count : 0)) * stride;
    }
  }
};

// Sums of a tile's rows with one row of x.
struct TileSums {
  int32_t low[kTile], high[kTile];
};

// One row of x.
template <typename Isa>
DROP_INLINE void quad_product(const QuadBytes& bytes, const int8_t* low, const int8_t* high,
                              int64_t stride, TrellisAhead& ahead, int32_t* low_sums,
                              int32_t* high_sums) {
  typedef typename Isa::Vec Vec;
  typename Isa::Acc sums[2 * kQuad];
  DROP_UNROLL
  for (int i = 0; i < 2 * kQuad; ++i) sums[i] = Isa::zero();
  Isa::walk(bytes, 0, stride, ahead,
            [&](int64_t j, const Vec* values) __attribute__((always_inline)) {
              const Vec l = Isa::load(low + j), h = Isa::load(high + j);
              DROP_UNROLL
              for (int i = 0; i < kQuad; ++i) {
                sums[i] = Isa::dot(sums[i], values[i], l);
                sums[kQuad + i] = Isa::dot(sums[kQuad + i], values[i], h);
              }
            });
  Isa::add_sums(sums, low_sums, high_sums);
}

// Values of inputs first .. last of a quad, in lines: [line][kQuad][kLine].
template <typename Isa>
DROP_INLINE void quad_values(const QuadBytes& bytes, int64_t first, int64_t last,
                             TrellisAhead& ahead, uint8_t* out) {
  typedef typename Isa::Vec Vec;
  Isa::walk(bytes, first, last, ahead,
            [&](int64_t j, const Vec* values) __attribute__((always_inline)) {
              uint8_t* to = out + (j - first) / kLine * (kQuad * kLine) + j % kLine;
              DROP_UNROLL
              for (int i = 0; i < kQuad; ++i) Isa::store(to + i * kLine, values[i]);
            });
}

// kRows rows of x with `count` inputs of a quad's values.
template <typename Isa, int kRows>
DROP_INLINE void dot_values(const uint8_t* values, int64_t count, const int8_t* x, int64_t stride,
                            TileSums* sums, int64_t row) {
  typedef typename Isa::Vec Vec;
  typename Isa::Acc totals[kRows][2 * kQuad];
  DROP_UNROLL
  for (int q = 0; q < kRows; ++q) {
    DROP_UNROLL
    for (int i = 0; i < 2 * kQuad; ++i) totals[q][i] = Isa::zero();
  }
  for (int64_t line = 0; line < count; line += kLine, values += kQuad * kLine) {
    for (int64_t j = 0; j < kLine; j += Isa::kWidth) {
      Vec x_bytes[kRows][2];
      DROP_UNROLL
      for (int q = 0; q < kRows; ++q) {
        x_bytes[q][0] = Isa::load(x + 2 * q * stride + line + j);
        x_bytes[q][1] = Isa::load(x + (2 * q + 1) * stride + line + j);
      }
      DROP_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        const Vec here = Isa::load(values + i * kLine + j);
        DROP_UNROLL
        for (int q = 0; q < kRows; ++q) {
          totals[q][i] = Isa::dot(totals[q][i], here, x_bytes[q][0]);
          totals[q][kQuad + i] = Isa::dot(totals[q][kQuad + i], here, x_bytes[q][1]);
        }
      }
    }
  }
  DROP_UNROLL
  for (int q = 0; q < kRows; ++q) {
    Isa::add_sums(totals[q], sums[q].low + row, sums[q].high + row);
  }
}

// All rows of x; `row` is the quad's first in the tile.
template <typename Isa>
static void quad_products(const QuadBytes& bytes, const TrellisInputs& x, TrellisAhead& ahead,
                          TileSums* sums, int64_t row) {
  constexpr int64_t kColumns = 2048;  // scratch of 8 KB
  alignas(64) uint8_t values[kQuad * kColumns];
  for (int64_t first = 0; first < x.stride; first += kColumns) {
    const int64_t last = first + kColumns < x.stride ? first + kColumns : x.stride;
    quad_values<Isa>(bytes, first, last, ahead, values);
    int64_t i = 0;
    for (; i + Isa::kRows <= x.n; i += Isa::kRows) {
      dot_values<Isa, Isa::kRows>(values, last - first, x.low(i) + first, x.stride, sums + i, row);
    }
    for (; i < x.n; ++i) {
      dot_values<Isa, 1>(values, last - first, x.low(i) + first, x.stride, sums + i, row);
    }
  }
}

// t = t + float(S_m) * scale_m, for the rows of a tile.
DROP_INLINE void add_plane(const TileSums& sums, int64_t raised, float scale, float* totals) {
  for (int64_t r = 0; r < kTile; ++r) {
    const int64_t exact = static_cast<int64_t>(sums.high[r]) * 256 + sums.low[r] - raised;
    totals[r] += static_cast<float>(exact) * scale;
  }
}

template <typename Isa>
static void trellis_gemv(const TrellisGemvJob& job, int64_t first, int64_t last) {
  const TrellisInputs& x = job.x;
  TrellisAhead ahead;
  for (int64_t tile = first; tile < last; ++tile) {
    ahead.start(job, tile, last);
    alignas(64) float totals[kTrellisRows][kTile];
    memset(totals, 0, static_cast<size_t>(x.n) * sizeof totals[0]);
    for (int64_t m = 0; m < job.prefix; ++m) {
      alignas(64) TileSums sums[kTrellisRows];
      memset(sums, 0, static_cast<size_t>(x.n) * sizeof sums[0]);
      for (int64_t row = 0; row < kTile && tile * kTile + row < job.d_out; row += kQuad) {
        const QuadBytes bytes(*job.books[m], job.planes[m], (tile * kTile + row) / kQuad, job.d_out,
                              x.stride);
        if (x.n == 1) {
          quad_product<Isa>(bytes, x.low(0), x.high(0), x.stride, ahead, sums[0].low + row,
                            sums[0].high + row);
        } else {
          quad_products<Isa>(bytes, x, ahead, sums, row);
        }
      }
      for (int64_t i = 0; i < x.n; ++i) {
        add_plane(sums[i], Isa::kOffset * x.sums[i], job.books[m]->scale, totals[i]);
      }
    }
    for (int64_t i = 0; i < x.n; ++i) {
      float* out = job.sums + i * job.sums_stride + (tile - first) * kTile;
      for (int64_t r = 0; r < kTile; ++r) out[r] = totals[i][r] * x.steps[i];
    }
  }
}

// One row of x [d_in] -> integers (trellis.h). Below 1e-25 it counts as 0; infinity or NaN give
// NaN.
static void trellis_input(const float* x, int64_t d_in, const TrellisInputs& out, int64_t row) {
  constexpr int64_t kChunk = 512;
  int16_t rounded[kChunk];
  int8_t *low = out.low(row), *high = out.high(row);
  uint32_t bits = 0;  // of the largest |x|; integer order is float order, NaN above all
  for (int64_t i = 0; i < d_in; ++i) {
    uint32_t here;
    memcpy(&here, x + i, 4);
    here &= 0x7fffffff;
    bits = here > bits ? here : bits;
  }
  float largest;
  memcpy(&largest, &bits, 4);
  const bool finite = bits < 0x7f800000;
  const float factor = !finite || largest < 1e-25f ? 0 : kInputMax / largest;
  int64_t sum = 0;
  for (int64_t start = 0; start < d_in; start += kChunk) {
    const int64_t count = d_in - start < kChunk ? d_in - start : kChunk;
    if (finite) {
      quantize(x + start, count, factor, rounded);
    } else {
      memset(rounded, 0, sizeof rounded);
    }
    int32_t here = 0;  // at most 512 * 32767
    for (int64_t i = 0; i < count; ++i) {
      here += rounded[i];
      const int8_t byte = static_cast<int8_t>(rounded[i]);
      low[start + i] = byte;
      high[start + i] = static_cast<int8_t>((rounded[i] - byte) >> 8);
    }
    sum += here;
  }
  memset(low + d_in, 0, static_cast<size_t>(out.stride - d_in));
  memset(high + d_in, 0, static_cast<size_t>(out.stride - d_in));
  out.sums[row] = sum;
  out.steps[row] = factor == 0 ? 0 : 1 / factor;
  if (!finite) {
    bits = 0x7fc00000;
    memcpy(out.steps + row, &bits, 4);
  }
}

template <Scalar kType>
DROP_INLINE void store_decoded(const float* totals, int64_t count, float scale, void* out,
                               int64_t at) {
  for (int64_t j = 0; j < count; ++j) store_scalar<kType>(out, at + j, totals[j] * scale);
}

template <typename Isa>
static void trellis_decode(const TrellisDecodeJob& job, int64_t first, int64_t last) {
  constexpr int64_t kColumns = 512;
  alignas(64) uint8_t values[kQuad * kColumns];
  alignas(64) float totals[kQuad][kColumns];
  const int64_t stride = trellis_stride(job.d_in);
  TrellisAhead ahead;  // the stores leave no time to gain
  ahead.count = ahead.column = ahead.wait = 0;
  ahead.every = 1;
  for (int64_t quad = first / kQuad; quad * kQuad < last; ++quad) {
    for (int64_t start = 0; start < job.d_in; start += kColumns) {
      const int64_t stop = start + kColumns < stride ? start + kColumns : stride;
      for (int64_t m = 0; m < job.prefix; ++m) {
        const Trellis& book = *job.books[m];
        quad_values<Isa>({book, job.planes[m], quad, job.d_out, stride}, start, stop, ahead,
                         values);
        for (int64_t j = 0; j < stop - start; j += kLine) {
          for (int64_t i = 0; i < kQuad; ++i) {
            float* to = totals[i] + j;
            const uint8_t* from = values + j * kQuad + i * kLine;
            for (int64_t c = 0; c < kLine; ++c) {
              const float value = static_cast<int8_t>(from[c] - Isa::kOffset) * book.scale;
              to[c] = m ? to[c] + value : value;
            }
          }
        }
      }
      const int64_t count = (job.d_in < stop ? job.d_in : stop) - start;
      for (int64_t i = 0; i < kQuad; ++i) {
        const int64_t row = quad * kQuad + i;
        if (row < first || row >= last) continue;
        const float scale = load_scalar(job.scales, job.scale_type, row);
        const int64_t at = (row - job.first_row) * job.d_in + start;
        if (job.out_type == kF32) {
          store_decoded<kF32>(totals[i], count, scale, job.out, at);
        } else {
          store_decoded<kBF16>(totals[i], count, scale, job.out, at);
        }
      }
    }
  }
}

}  // namespace DROP_ISA
}  // namespace drop
