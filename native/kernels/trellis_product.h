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
//   load, store, zero, dot of registers
//   sum_lanes              eight Acc, those of four rows with low and then with high bytes of x, ->
//                          low[4], high[4]
//   walk                   calls sink(j, values[4]) for the inputs j of a quad, kWidth at a time
#pragma once

#include "scalar.h"

namespace drop {
namespace DROP_ISA {

// Prefetching. Byte rows of a tile lie `stride` apart, each a stream too short for the hardware to
// follow; so the lines of all byte rows of a later tile are fetched side by side, evenly spread. A
// tile of P planes has 2 P walks along the inputs, at each line of which one slot is fetched, in
// turn; there are 2 P slots, and those that no byte row needs follow a row that is being read.
class TrellisAhead {
 public:
  TrellisAhead() : slots_{0}, at_(0), count_(1), distance_(0) {}
  explicit TrellisAhead(const TrellisGemvJob& job) : at_(0), count_(2 * job.prefix) {
    int64_t bits = 0;
    for (int64_t m = 0; m < job.prefix; ++m) bits += job.books[m]->bits;
    distance_ = tiles_ahead(bits, job.x.stride);
  }

  // Before `tile` is computed; tiles end at `last`.
  void start(const TrellisGemvJob& job, int64_t tile, int64_t last) {
    const uint8_t* const* planes = job.planes;
    int64_t later = tile + distance_, filled = 0;
    if (later >= last) {
      planes = job.next_planes;
      later += job.next_first - last;
      if (later >= job.next_last) planes = nullptr;
    }
    for (int64_t m = 0; m < job.prefix && planes; ++m) {
      const int64_t k = job.books[m]->bits;
      for (int64_t row = 0; row < k; ++row) {
        slots_[filled++] = address(planes[m], (later * k + row) * job.x.stride);
      }
    }
    const int64_t here = tile * job.books[0]->bits;
    while (filled < count_) slots_[filled++] = address(job.planes[0], here * job.x.stride);
    at_ = 0;
  }

  // Once a line of a quad and plane.
  inline __attribute__((always_inline)) void step() {
    const uintptr_t here = slots_[at_];
    slots_[at_] = here + kLine;
    at_ = at_ + 1 == count_ ? 0 : at_ + 1;
    __builtin_prefetch(reinterpret_cast<const void*>(here));
  }

 private:
  // A number: a slot may end behind the plane.
  static uintptr_t address(const uint8_t* plane, int64_t offset) {
    return reinterpret_cast<uintptr_t>(plane) + static_cast<uintptr_t>(offset);
  }

  uintptr_t slots_[2 * kMaxPlanes];
  int64_t at_, count_, distance_;
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
  Isa::sum_lanes(sums, low_sums, high_sums);
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
    int32_t low[kQuad], high[kQuad];
    Isa::sum_lanes(totals[q], low, high);
    for (int i = 0; i < kQuad; ++i) {
      sums[q].low[row + i] += low[i];
      sums[q].high[row + i] += high[i];
    }
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

// A tile's sums over all planes, before the step: totals [n][kTile].
template <typename Isa>
DROP_INLINE void tile_product(const TrellisGemvJob& job, int64_t tile, TrellisAhead& ahead,
                              float (*totals)[kTile]) {
  const TrellisInputs& x = job.x;
  const int8_t *low = x.low(0), *high = x.high(0);
  const bool whole = tile * kTile + kQuad < job.d_out;  // has two quads
  for (int64_t r = 0; r < kTile; ++r) totals[0][r] = 0;
  for (int64_t m = 0; m < job.prefix; ++m) {
    const Trellis& book = *job.books[m];
    TileSums sums;
    if (!whole) memset(&sums, 0, sizeof sums);
    for (int64_t q = 0; q < (whole ? 2 : 1); ++q) {
      const QuadBytes bytes(book, job.planes[m], tile * 2 + q, job.d_out, x.stride);
      quad_product<Isa>(bytes, low, high, x.stride, ahead, sums.low + kQuad * q,
                        sums.high + kQuad * q);
    }
    add_plane(sums, Isa::kOffset * x.sums[0], book.scale, totals[0]);
  }
}

template <typename Isa>
static void tile_products(const TrellisGemvJob& job, int64_t tile, TrellisAhead& ahead,
                          float (*totals)[kTile]) {
  TrellisInputs x = job.x;
  const size_t n = static_cast<size_t>(x.n);
  TileSums sums[kTrellisRows];
  memset(totals, 0, n * sizeof *totals);
  const auto reads = [&](int64_t i, int64_t m) { return !job.prefixes || m < job.prefixes[i]; };
  for (int64_t m = 0; m < job.prefix; ++m) {
    while (!reads(x.n - 1, m)) --x.n;  // one row reads them all
    memset(sums, 0, n * sizeof *sums);
    for (int64_t row = 0; row < kTile && tile * kTile + row < job.d_out; row += kQuad) {
      const int64_t quad = (tile * kTile + row) / kQuad;
      quad_products<Isa>({*job.books[m], job.planes[m], quad, job.d_out, x.stride}, x, ahead, sums,
                         row);
    }
    for (int64_t i = 0; i < x.n; ++i) {
      if (!reads(i, m)) continue;
      add_plane(sums[i], Isa::kOffset * x.sums[i], job.books[m]->scale, totals[i]);
    }
  }
}

template <typename Isa>
static void trellis_gemv(const TrellisGemvJob& job, int64_t first, int64_t last) {
  TrellisAhead ahead(job);
  float totals[kTrellisRows][kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    ahead.start(job, tile, last);
    if (job.x.n == 1) {
      tile_product<Isa>(job, tile, ahead, totals);
    } else {
      tile_products<Isa>(job, tile, ahead, totals);
    }
    for (int64_t i = 0; i < job.x.n; ++i) {
      float* out = job.sums + i * job.sums_stride + (tile - first) * kTile;
      for (int64_t r = 0; r < kTile; ++r) out[r] = totals[i][r] * job.x.steps[i];
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
  TrellisAhead ahead;  // of nothing: the stores leave no time to gain
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
