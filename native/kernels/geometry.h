// Packed codes: one layout for every instruction set.
//
// A plane is the matrix of codes of one codebook, uint8 [d_out, G]. Canonically it is row
// major. Packed, it is ordered so that a vector register holds the same group of many rows, and so
// that one pass over the plane is one sequential read:
//
//     for block b of kBlock groups         (its LUT takes a third of the first cache)
//       for strip s of kStrip rows
//         for group j of the block: 64 bytes, one code each of the strip's rows
//
// Rows are padded to whole strips and never further, so 576 rows cost 576 bytes a group. Inside a
// strip, byte 2i is row i and byte 2i + 1 is row 32 + i: sums taken over the even and over the odd
// bytes of a register as 16-bit lanes then come out in row order.
//
// Kernels walk several strips at once (a tile), which reads several sequential streams side by
// side. That matters: a core follows four streams at 90 % of its best read rate while computing,
// one stream at 60 to 75 % (hardware prefetchers work page by page and start anew at each).
//
// A block is also the span over which LUT entries are summed as integers before the sum is
// scaled and added in float32 (lut.h).
#pragma once

#include <cstddef>

#include "common/constants.h"

namespace drop {

constexpr int kMaxPlanes = 64;      // largest P that can be decoded
constexpr int64_t kStrip = 64;      // rows of a strip
constexpr int64_t kTileStrips = 4;  // most strips of a tile
constexpr int64_t kBlock = 64;      // groups of a block

static inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

struct PlaneShape {
  int64_t d_out, groups;

  int64_t padded_rows() const { return round_up(d_out, kStrip); }
  int64_t strips() const { return padded_rows() / kStrip; }
  int64_t blocks() const { return (groups + kBlock - 1) / kBlock; }
  int64_t bytes() const { return padded_rows() * groups; }
  int64_t block_groups(int64_t block) const {
    const int64_t left = groups - block * kBlock;
    return left < kBlock ? left : kBlock;
  }
  // Bytes from the start of the plane to group 0 of a block in a strip; groups are kStrip apart.
  int64_t offset(int64_t block, int64_t strip) const {
    return (block * kBlock * padded_rows()) + strip * kStrip * block_groups(block);
  }
};

// Byte of a row (0 .. kStrip - 1) inside its strip.
static inline int64_t row_byte(int64_t row) { return row < 32 ? 2 * row : 2 * (row - 32) + 1; }

}  // namespace drop
